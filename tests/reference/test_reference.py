"""References: right answers, admission rules that fire and stay silent, files that come back."""

import dataclasses
import json

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch

import vi_toolkit as vi
from tests.tolerances import Z
from vi_toolkit.errors import InvalidReferenceError, LoadError
from vi_toolkit.programs.joint import Joint
from vi_toolkit.reference import reference as module
from vi_toolkit.reference.reference import LEVELS, Reference

COVARIANCE = np.array([[1.0, 0.6, 0.0], [0.6, 1.0, 0.3], [0.0, 0.3, 4.0]])


def location_scale(y):
    """Two latents, one of them positive; the flat prior has no sampler."""
    mu = pyro.sample("mu", dist.ImproperUniform(dist.constraints.real, (), ()))
    sigma = pyro.sample("sigma", dist.HalfCauchy(2.5))
    with pyro.plate("observations", len(y)):
        pyro.sample("y", dist.Normal(mu, sigma), obs=y)


def regression(X, y):
    """Gaussian posterior with a known evidence."""
    d = X.shape[1]
    w = pyro.sample("w", dist.Normal(torch.zeros(d, dtype=X.dtype), 2.0).to_event(1))
    with pyro.plate("observations", len(y)):
        pyro.sample("y", dist.Normal(X @ w, 0.5), obs=y)


def three(y):
    """Three latents with unlike shapes and supports, as a source of names."""
    pyro.sample("a", dist.Normal(0.0, 1.0))
    pyro.sample("b", dist.HalfNormal(1.0))
    p = pyro.sample("p", dist.Beta(1.0, 1.0))
    pyro.sample("y", dist.Bernoulli(p), obs=y)


@pytest.fixture(scope="module")
def y():
    return torch.randn(100, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 1


@pytest.fixture(scope="module")
def nuts(y):
    return Reference.nuts(
        location_scale,
        {"y": y},
        chains=2,
        num_draws=1200,
        warmup=250,
        progress=False,
        target_accept=0.9,
    )


@pytest.fixture
def joint():
    return Joint(three, {"y": torch.tensor(1.0)})


def independent(chains=4, n=1000, seed=0):
    """Draws of ``three``'s latents in which nothing is wrong."""
    rng = np.random.default_rng(seed)
    z = torch.from_numpy(rng.standard_normal((chains, n, 3)))
    return {"a": z[..., 0], "b": z[..., 1].exp(), "p": z[..., 2].sigmoid()}


# Closed forms, enumeration, quadrature -----------------------------------------------------


def test_exact_gaussian():
    r = Reference.exact(["a", "b", "c"], [1.0, 2.0, 3.0], COVARIANCE, log_evidence=-1.5)
    assert r.near_gaussian
    assert r.sd == pytest.approx([1, 1, 2])
    precision = np.linalg.inv(COVARIANCE)
    expected = (precision.diagonal() * COVARIANCE.diagonal()) ** -0.5
    assert r.mean_field_sd_ratio == pytest.approx(expected, rel=1e-12)
    assert r.quantiles["95%"] == pytest.approx(r.mean + 1.6448536 * r.sd)
    assert not r.mean_se.any()
    assert r.log_evidence == -1.5
    assert list(r.table.index) == ["a", "b", "c"]
    assert repr(r) == "Reference(exact, 3 scalars, near-Gaussian)"


def test_mean_field_ratio_does_not_depend_on_units():
    scale = np.array([1e-6, 1.0, 1e7])
    one = Reference.exact(["a", "b", "c"], np.zeros(3), COVARIANCE)
    other = Reference.exact(["a", "b", "c"], np.zeros(3), COVARIANCE * np.outer(scale, scale))
    assert other.mean_field_sd_ratio == pytest.approx(one.mean_field_sd_ratio, rel=1e-12)


@pytest.mark.parametrize(
    ("skewness", "kurtosis", "near"), [(0.24, -0.34, True), (-0.26, 0, False), (0, 0.36, False)]
)
def test_near_gaussian(skewness, kurtosis, near):
    r = Reference.exact(
        ["a", "b"], [0, 0], np.eye(2), skewness=[0, skewness], excess_kurtosis=[kurtosis, 0]
    )
    assert r.near_gaussian is near
    assert r.quantiles == {}  # the Normal's would be wrong


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"kind": "guess"}, "kind"),
        ({"names": ["a", "a", "c"]}, "distinct"),
        ({"mean": np.zeros(2)}, "mean must have shape"),
        ({"sd": np.array([1.0, 0.0, 2.0])}, "b does not vary"),
        ({"skewness": np.array([0.0, np.nan, 0.0])}, "skewness of b"),
        ({"quantiles": {"6%": np.zeros(3)}}, "unknown quantile"),
        ({"covariance": COVARIANCE + np.triu(np.ones((3, 3)), 1)}, "not symmetric"),
        ({"covariance": COVARIANCE * 1.1}, "diagonal"),
    ],
)
def test_inconsistent_fields_are_refused(change, complaint):
    r = Reference.exact(["a", "b", "c"], np.zeros(3), COVARIANCE)
    with pytest.raises(InvalidReferenceError, match=complaint):
        dataclasses.replace(r, **change)


def test_enumeration_of_two_coins():
    values = [[0, 0], [0, 1], [1, 0], [1, 1]]
    p = np.array([0.1, 0.2, 0.05, 0.25])
    r = Reference.enumeration(["u", "v"], values, np.log(p))
    p /= p.sum()
    assert r.mean == pytest.approx([p[2] + p[3], p[1] + p[3]], rel=1e-12)
    assert r.covariance[0, 1] == pytest.approx(p[3] - r.mean[0] * r.mean[1], rel=1e-10)
    assert r.log_evidence == pytest.approx(np.log(0.6), rel=1e-12)
    assert r.quantiles["50%"].tolist() == [0, 1]
    assert r.sites[1]["mean"] == pytest.approx(r.mean[1])


@pytest.mark.parametrize(
    ("x", "mean", "sd"),
    [(1.0, 0.41324193, 0.91062128), (-3.0, -0.68902743, 0.72473526), (10.0, 0.7851912, 0.6192534)],
)
def test_quadrature_of_one_datum_logistic(x, mean, sd):
    """Independent numbers (200-point Gauss-Hermite); the evidence is 1/2 whatever x is."""

    def model(y):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Bernoulli(logits=x * z), obs=y)

    r = Reference.quadrature(model, {"y": torch.tensor(1.0)})
    assert r.mean[0] == pytest.approx(mean, abs=1e-8)
    assert r.sd[0] == pytest.approx(sd, abs=1e-8)
    assert r.log_evidence == pytest.approx(-np.log(2), abs=1e-9)


def test_quadrature_of_a_correlated_gaussian():
    X = torch.tensor([[1.0, 1.0], [1.0, 1.2], [1.0, 0.7], [1.0, 1.1]], dtype=torch.float64)
    y = torch.tensor([2.0, 2.5, 1.0, 2.2], dtype=torch.float64)
    r = Reference.quadrature(regression, {"X": X, "y": y})
    covariance = np.linalg.inv(X.T.numpy() @ X.numpy() / 0.25 + np.eye(2) / 4)
    assert r.covariance == pytest.approx(covariance, rel=1e-7)
    assert r.mean == pytest.approx(covariance @ (X.T @ y).numpy() / 0.25, rel=1e-7)
    marginal = scipy.stats.multivariate_normal(np.zeros(4), (X @ X.T).numpy() * 4 + np.eye(4) / 4)
    assert r.log_evidence == pytest.approx(marginal.logpdf(y), abs=1e-8)
    for level, p in LEVELS.items():
        exact = scipy.stats.norm.ppf(p, r.mean, r.sd)
        assert r.quantiles[level] == pytest.approx(exact, abs=1e-7)


def test_quadrature_on_the_models_own_scale():
    def model(y):
        p = pyro.sample("p", dist.Beta(2.0, 3.0))
        with pyro.plate("observations", len(y)):
            pyro.sample("y", dist.Bernoulli(p), obs=y)

    r = Reference.quadrature(model, {"y": torch.tensor([1.0, 1.0, 0.0])})
    exact = scipy.stats.beta(4, 4)
    assert r.names == ["logit(p)"]
    (row,) = r.sites
    assert [row["mean"], row["sd"]] == pytest.approx([exact.mean(), exact.std()], abs=1e-8)
    assert [row[k] for k in ("5%", "50%", "95%")] == pytest.approx(exact.ppf([0.05, 0.5, 0.95]))


def test_quadrature_refuses_what_it_cannot_do(y):
    with pytest.raises(InvalidReferenceError, match="has 4"):
        Reference.quadrature(regression, {"X": torch.ones(100, 4, dtype=y.dtype), "y": y})

    def heavy(y):
        pyro.sample("z", dist.Cauchy(0.0, 1.0))

    with pytest.raises(InvalidReferenceError, match=r"Reference\.nuts"):
        Reference.quadrature(heavy, {"y": y})


# Draws and the admission rules -------------------------------------------------------------


def test_moments_of_independent_draws(joint):
    draws = independent()
    r = Reference.from_draws(joint, draws, "nuts", {"divergences": 0})
    assert r.names == ["a", "log(b)", "logit(p)"]
    n = 4000
    # Independent draws: the mean has se sd / sqrt(n) and the sd has sd / sqrt(2 n), to ESS' noise.
    assert r.mean_se == pytest.approx(r.sd / np.sqrt(n), rel=0.15)
    assert r.sd_se == pytest.approx(r.sd / np.sqrt(2 * n), rel=0.15)
    assert r.conditional_sd_se == pytest.approx(r.sd / np.sqrt(2 * n), rel=0.15)
    assert np.abs(r.mean).max() < Z / np.sqrt(n)
    assert np.abs(r.skewness).max() < Z * np.sqrt(6 / n)
    # The density at the median, 0.399, turns the se of a rank into that of a quantile.
    assert r.quantiles_se["50%"] == pytest.approx(0.5 / np.sqrt(n) / 0.399, rel=0.25)
    assert r.near_gaussian
    row = r.sites[1]
    assert row["name"] == "b"
    assert row["mean"] == pytest.approx(float(draws["b"].mean()))
    assert row["95%"] == pytest.approx(float(draws["b"].quantile(0.95)), rel=1e-6)


def test_error_of_the_conditional_sd(joint):
    """Over many references its spread is what conditional_sd_se says."""
    correlated, said = [], []
    root = np.linalg.cholesky(COVARIANCE)
    for seed in range(60):
        rng = np.random.default_rng(seed)
        z = torch.from_numpy(rng.standard_normal((4, 500, 3)) @ root.T)
        draws = {"a": z[..., 0], "b": z[..., 1].exp(), "p": z[..., 2].sigmoid()}
        r = Reference.from_draws(joint, draws, "exact")
        correlated.append(r.mean_field_sd_ratio * r.sd)
        said.append(r.conditional_sd_se)
    spread = np.std(correlated, axis=0, ddof=1)
    # The spread of 60 numbers has a relative standard error of 1 / sqrt(2 * 59).
    assert spread == pytest.approx(np.mean(said, axis=0), rel=Z / np.sqrt(118))
    exact = np.linalg.inv(COVARIANCE).diagonal() ** -0.5
    assert np.all(np.abs(np.mean(correlated, axis=0) - exact) < Z * spread / np.sqrt(60) + 2e-3)


def stuck(draws):
    """An autocorrelated chain: every draw eight times."""
    return {k: v[:, ::8].repeat_interleave(8, dim=1) for k, v in draws.items()}


@pytest.mark.parametrize(
    ("spoil", "divergences", "complaint"),
    [
        (lambda d: d, 0, None),
        (lambda d: d | {"b": d["b"] * torch.tensor([1.0, 1, 1, 1.6])[:, None]}, 0,
         r"rank R-hat of log\(b\) is 1\.\d+ \(must be below 1\.01\)"),
        (stuck, 0, r"bulk ESS of \S+ is \d+ \(must be at least 1000\); tail ESS of"),
        (lambda d: d, 2, "2 transitions diverged"),
        (lambda d: d, None, "how many transitions diverged"),
        (lambda d: {k: v[:1] for k, v in d.items()}, 0, "two chains"),
        (lambda d: d | {"a": d["a"] * torch.tensor([1.0, 1, 1, torch.inf])[:, None]}, 0,
         "draws of a are not all finite"),
        (lambda d: d | {"p": torch.full_like(d["p"], 0.5)}, 0, r"logit\(p\) does not vary"),
    ],
)  # fmt: skip
def test_admission(joint, spoil, divergences, complaint):
    made = {} if divergences is None else {"divergences": divergences}
    draws = spoil(independent())
    if complaint is None:
        r = Reference.from_draws(joint, draws, "nuts", made)
        assert r.made["r_hat"] < 1.01
        assert min(r.made["bulk_ess"], r.made["tail_ess"]) >= 1000
    else:
        with pytest.raises(InvalidReferenceError, match=complaint):
            Reference.from_draws(joint, draws, "nuts", made)


def test_vector_and_simplex_sites():
    def model(y):
        w = pyro.sample("w", dist.Normal(torch.zeros(2, 2), 1.0).to_event(2))
        q = pyro.sample("q", dist.Dirichlet(torch.ones(3)))
        pyro.sample("y", dist.Normal(w.sum() + q[0], 1.0), obs=y)

    joint = Joint(model, {"y": torch.tensor(0.0)})
    rng = np.random.default_rng(0)
    draws = {
        "w": torch.from_numpy(rng.standard_normal((4, 600, 2, 2))),
        "q": torch.from_numpy(rng.dirichlet(np.ones(3), (4, 600))),
    }
    r = Reference.from_draws(joint, draws, made={"divergences": 0})
    assert r.names[:4] == ["w[0,0]", "w[0,1]", "w[1,0]", "w[1,1]"]
    assert len(r.names) == 6  # the simplex has two free scalars, but three on its own scale
    assert [row["name"] for row in r.sites[4:]] == ["q[0]", "q[1]", "q[2]"]
    assert r.sites[6]["mean"] == pytest.approx(float(draws["q"][..., 2].mean()))


# NUTS --------------------------------------------------------------------------------------


def test_nuts_agrees_with_quadrature(nuts, y):
    exact = Reference.quadrature(location_scale, {"y": y})
    assert nuts.names == exact.names == ["mu", "log(sigma)"]
    assert np.all(np.abs(nuts.mean - exact.mean) < Z * nuts.mean_se)
    assert np.all(np.abs(nuts.sd - exact.sd) < Z * nuts.sd_se)
    for level in LEVELS:
        error = np.abs(nuts.quantiles[level] - exact.quantiles[level])
        assert np.all(error < Z * nuts.quantiles_se[level]), level
    for row, other in zip(nuts.sites, exact.sites, strict=True):
        assert abs(row["mean"] - other["mean"]) < Z * row["mean_se"]


def test_nuts_says_how_it_was_made(nuts):
    made = nuts.made
    assert made["divergences"] == 0
    assert made["r_hat"] < 1.01
    assert len(set(made["chain_seeds"])) == made["chains"] == 2
    assert made["versions"]["pyro-ppl"] == pyro.__version__
    assert "seed=0" in made["command"]


def short(y, **options):
    options = {"chains": 2, "draws": 30, "warmup": 50, "progress": False} | options
    return Reference.nuts(location_scale, {"y": y}, **options)


def test_nuts_is_refused_when_too_short(y):
    with pytest.raises(
        InvalidReferenceError, match=r"bulk ESS of \S+ is \d+ \(must be at least 1000\)"
    ):
        short(y)
    with pytest.raises(InvalidReferenceError, match="at least two"):
        short(y, chains=1)


def test_what_is_refused_is_not_lost(y, tmp_path):
    with pytest.raises(InvalidReferenceError, match=r"error\.reference has") as caught:
        short(y)
    refused = caught.value.reference
    assert isinstance(refused, Reference)
    assert "bulk ESS" in refused.made["refused"]
    assert refused.made["refused"] in str(caught.value)
    assert refused.names == ["mu", "log(sigma)"]
    # 60 draws, but of the posterior: a few of their own standard errors from the exact mean of mu.
    assert abs(refused.mean[0] - float(y.mean())) < 1.0
    refused.save(tmp_path / "refused.json")
    assert Reference.load(tmp_path / "refused.json").made == refused.made


def test_what_is_admitted_was_not_refused(nuts):
    assert "refused" not in nuts.made


def test_other_refusals_have_no_reference():
    with pytest.raises(InvalidReferenceError) as caught:
        Reference.exact(["a"], [0.0], [[0.0]])
    assert caught.value.reference is None


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (lambda y: {"y": y.numpy()}, r'data\["y"\] is a numpy.ndarray where the model needs'),
        (lambda y: {"y": pd.Series(y)}, r'torch.as_tensor\(data\["y"\].to_numpy\(\)\)'),
        (lambda y: {"x": y}, r"needs the argument 'y', which data does not have"),
        (lambda y: {"y": y * torch.nan}, "values that are not finite"),
        (lambda y: [y], "data is a list"),
    ],
    ids=["numpy", "pandas", "another name", "nan", "a list"],
)
def test_nuts_checks_its_data(y, data, message):
    with pytest.raises(vi.PreflightError, match=message):
        Reference.nuts(location_scale, data(y), num_draws=30, warmup=50, progress=False)


def test_nuts_seed_and_surroundings(y, monkeypatch, capfd):
    monkeypatch.setattr(module, "MIN_ESS", 1)
    monkeypatch.setattr(module, "MAX_R_HAT", 10)
    pyro.param("mine", torch.tensor(1.0))
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    first = short(y, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)  # noqa: NPY002
    assert list(pyro.get_param_store()) == ["mine"]
    assert torch.get_default_dtype() == torch.float32
    torch.rand(3)  # what the caller draws in between must not matter
    again, other = short(y, seed=3), short(y, seed=4)
    assert np.array_equal(first.mean, again.mean)
    assert not np.array_equal(first.mean, other.mean)
    assert capfd.readouterr() == ("", "")
    # Single-precision data are taken to double, so the chains differ by the data's rounding only.
    single = short(y.float(), seed=3)
    assert np.all(np.abs(single.mean - first.mean) < first.sd)


def test_progress_bar(y, monkeypatch, capfd):
    monkeypatch.setattr(module, "MIN_ESS", 1)
    monkeypatch.setattr(module, "MAX_R_HAT", 10)
    # Pyro shows no bars where either of these is set, as under pytest-xdist.
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    short(y, progress=True)
    assert "Sample" in capfd.readouterr().err


# Files -------------------------------------------------------------------------------------


def assert_same(a, b):
    for field in dataclasses.fields(Reference):
        left, right = getattr(a, field.name), getattr(b, field.name)
        if isinstance(left, np.ndarray):
            assert left.dtype == right.dtype == np.float64
            assert left.tobytes() == right.tobytes(), field.name
        elif isinstance(left, dict) and field.name != "made":
            assert left.keys() == right.keys()
            assert all(left[k].tobytes() == right[k].tobytes() for k in left), field.name
        else:
            assert left == right, field.name


def test_round_trip_bit_for_bit(nuts, tmp_path):
    awkward = Reference.exact(
        ["a", "b"],
        [1 / 3, -1e300],
        np.diag([np.nextafter(1.0, 2.0), 5e-324 + 1e-200]),
        skewness=[0.1, 0.2],
        log_evidence=-np.pi,
    )
    unknown = dataclasses.replace(awkward, covariance=None, log_evidence=None)
    for number, r in enumerate((nuts, awkward, unknown)):
        path = tmp_path / f"{number}.json"
        r.save(path)
        back = Reference.load(path)
        assert_same(r, back)
        back.save(tmp_path / "again.json")
        assert path.read_bytes() == (tmp_path / "again.json").read_bytes()


def test_the_file_can_be_read_by_people(nuts, tmp_path):
    path = tmp_path / "reference.json"
    nuts.save(path)
    lines = path.read_text().splitlines()
    assert max(map(len, lines)) < 250
    assert any(line.startswith(' "mean": [') for line in lines)  # one line per quantity
    content = json.loads(path.read_text())
    assert list(content) == sorted(content)
    assert all(len(repr(x)) < 20 for x in content["mean"] + content["sd_se"])
    assert "date" not in path.read_text()


def test_a_truncated_file(nuts, tmp_path):
    path = tmp_path / "reference.json"
    nuts.save(path)
    whole = path.read_bytes()
    for length in (0, 1, len(whole) // 2, len(whole) - 3):
        path.write_bytes(whole[:length])
        with pytest.raises(LoadError, match="cut short"):
            Reference.load(path)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"\x80\x81\xfe\xff binary", "not JSON"),
        (b"[1, 2, 3]", "not a reference"),
        (b'{"draws": [1, 2]}', "not a reference"),
    ],
)
def test_a_foreign_file(tmp_path, content, complaint):
    path = tmp_path / "reference.json"
    path.write_bytes(content)
    with pytest.raises(LoadError, match=complaint):
        Reference.load(path)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"format_version": 99}, "version 99"),
        ({"mean": [1.0, 2.0]}, "mean must have shape"),
        ({"mean": "none"}, "not a valid"),
        ({"sd": [1.0, float("nan"), 2.0]}, "not a finite number"),
        ({"quantiles": [1, 2]}, "not a valid"),
        ({"kind": "rumour"}, "kind"),
        ({"covariance": None, "names": None}, "not a valid"),
    ],
)
def test_a_corrupt_file(tmp_path, change, complaint):
    path = tmp_path / "reference.json"
    Reference.exact(["a", "b", "c"], np.zeros(3), COVARIANCE).save(path)
    content = json.loads(path.read_text()) | change
    path.write_text(json.dumps(content))
    with pytest.raises(LoadError, match=complaint):
        Reference.load(path)


def test_a_missing_field_and_a_missing_file(tmp_path):
    path = tmp_path / "reference.json"
    Reference.exact(["a", "b", "c"], np.zeros(3), COVARIANCE).save(path)
    content = json.loads(path.read_text())
    del content["sd_se"]
    path.write_text(json.dumps(content))
    with pytest.raises(LoadError, match="lacks sd_se"):
        Reference.load(path)
    with pytest.raises(FileNotFoundError):
        Reference.load(tmp_path / "nowhere.json")
