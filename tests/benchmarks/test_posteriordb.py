"""The table of benchmarks/posteriordb.py, on a synthetic folder of exactly Gaussian posteriors."""

import json
import zipfile

import numpy as np
import pytest

from benchmarks import posteriordb
from benchmarks.posteriordb_models import columns_to_sites
from tests.tolerances import Z

# One observation, flat prior: the posterior is Normal(location, precision), exactly.
MODELS_FILE = """
import pyro, pyro.distributions as dist, torch
from benchmarks.posteriordb_models import Posterior

def model(precision, location):
    x = pyro.sample("x", dist.Normal(0.0, 1.0).expand([2]).to_event(1).mask(False))
    pyro.sample("y", dist.MultivariateNormal(x, precision_matrix=precision), obs=location)

def prepare(raw):
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in raw.items()}

toy = Posterior(model, prepare)
MODELS = {"toy-right": toy, "toy-shifted": toy, "broken-right": toy}
"""
PRECISION = np.array([[2.0, 1.2], [1.2, 1.0]])
LOCATION = np.array([3.0, -1000.0])


def write_zip(path, content):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(path.name.removesuffix(".zip"), json.dumps(content))


def exact_draws(n=10_000):
    """Draws whose sample mean and covariance are those of the posterior to rounding."""
    noise = np.random.default_rng(0).standard_normal((n, 2))
    noise -= noise.mean(0)
    whitened = noise @ np.linalg.inv(np.linalg.cholesky(np.cov(noise.T))).T
    return LOCATION + whitened @ np.linalg.cholesky(np.linalg.inv(PRECISION)).T


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "draws").mkdir()
    (tmp_path / "models.py").write_text(MODELS_FILE)
    data = {"precision": PRECISION.tolist(), "location": LOCATION.tolist()}
    write_zip(tmp_path / "data" / "toy.json.zip", data)
    write_zip(tmp_path / "data" / "broken.json.zip", data | {"location": [1.0, 2.0, 3.0]})
    draws = exact_draws()
    sd = draws.std(0)
    shifts = {"toy-right": 0.0, "toy-shifted": 0.2, "toy-unknown": 0.0, "broken-right": 0.0}
    for name, shift in shifts.items():
        shifted = draws + shift * sd
        chains = [
            {f"x[{i + 1}]": shifted[chain::10, i].tolist() for i in range(2)} for chain in range(10)
        ]
        write_zip(tmp_path / "draws" / f"{name}.json.zip", chains)
        (tmp_path / "draws" / f"{name}.info.json").write_text("{}")
    return tmp_path


def test_the_table_has_a_row_for_each_posterior_and_guide(folder, capsys):
    failed = posteriordb.main(["--folder", str(folder), "--models", str(folder / "models.py")])
    lines = capsys.readouterr().out.splitlines()
    rows = {(line.split()[0], line.split()[1]): line.split() for line in lines[1:7]}
    for guide in ("full-rank", "mean-field"):
        # 2: d, 3: near-Gaussian, 4: mean error, 6: right, 8: converged (see COLUMNS)
        assert rows["toy-right", guide][2:4] == ["2", "yes"]
        assert rows["toy-right", guide][6] == "yes"
        assert rows["toy-right", guide][8] == "yes"
        assert rows["toy-shifted", guide][6] == "no"
        # the shift, up to the Monte Carlo error of the fit's draws and the rounding of the table
        error = float(rows["toy-shifted", guide][4])
        assert error == pytest.approx(0.2, abs=Z / posteriordb.DRAWS**0.5 + 0.0005)
        assert f"right, {guide}: 1 of 2 near-Gaussian, 0 of 0 other" in lines
        assert "Error" in " ".join(rows["broken-right", guide])
    assert failed == 2
    assert lines[-1].endswith("toy-unknown")


def test_guides_and_posteriors_can_be_chosen(folder, capsys):
    models = ["--folder", str(folder), "--models", str(folder / "models.py")]
    posteriordb.main([*models, "--guides", "mean-field", "--posteriors", "toy-right"])
    assert len(capsys.readouterr().out.splitlines()) == 3  # header, one row, one count
    with pytest.raises(SystemExit):
        posteriordb.main([*models, "--guides", "meanfield"])
    with pytest.raises(SystemExit):
        posteriordb.main([*models, "--posteriors", "toy-rihgt"])


def test_the_folder_is_taken_from_the_environment(folder, monkeypatch):
    monkeypatch.setenv("VI_BENCH_DATA", str(folder.parent))
    folder.rename(folder.parent / "posteriordb")
    assert posteriordb.arguments([]).posteriors[0] == "broken-right"
    monkeypatch.delenv("VI_BENCH_DATA")
    with pytest.raises(SystemExit):
        posteriordb.arguments([])


def test_each_family_is_scored_against_its_own_theory():
    """Mean field is scored against its own theory, full rank against the reference."""
    draws = exact_draws()
    r = (PRECISION.diagonal() * np.linalg.inv(PRECISION).diagonal()) ** -0.5
    narrow = draws.mean(0) + (draws - draws.mean(0)) * r
    # exact up to rounding: the draws have the posterior's moments by construction
    assert posteriordb.score(narrow, draws, "mean-field")[1:] == pytest.approx((0, 1), abs=1e-9)
    assert posteriordb.score(draws, draws, "full-rank")[1:] == pytest.approx((0, 1), abs=1e-9)
    assert posteriordb.score(narrow, draws, "full-rank").sd_ratio == pytest.approx(min(r))
    assert posteriordb.score(draws, draws, "mean-field").sd_ratio == pytest.approx(1 / min(r))
    assert posteriordb.score(draws, draws, "full-rank").near_gaussian
    assert not posteriordb.score(draws**3, draws**3, "full-rank").near_gaussian


def test_columns_are_gathered_into_sites():
    columns = {
        "a": np.arange(4),
        "b[1]": np.ones(4),
        "b[2]": 2 * np.ones(4),
        "c[1,2]": np.ones(4),
        "c[1,1]": np.zeros(4),
    }
    sites = columns_to_sites(columns)
    assert sites["a"].tolist() == [0, 1, 2, 3]
    assert sites["b"][0].tolist() == [1, 2]
    assert sites["c"].shape == (4, 1, 2)
    assert sites["c"][0].tolist() == [[0, 1]]
    with pytest.raises(ValueError, match="column name"):
        columns_to_sites({"b[x]": np.ones(4)})
