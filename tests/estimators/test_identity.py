"""Each gradient equals the one worked out by hand from the same draw, without Monte Carlo error."""

import pytest
import torch

import vi_toolkit as vi
from tests.estimators.models import DATA, TOYS, B, N, X, capturing, gradient

pytestmark = pytest.mark.parametrize("subsample", [None, B], ids=["full", "subsampled"])
KINDS = pytest.mark.parametrize("kind", list(TOYS))
PARTICLES = pytest.mark.parametrize("particles", [1, 3])


def step(estimator, kind, subsample):
    """(toy, estimator's gradient, list of (g, z, indices) per particle, N / B)."""
    toy = TOYS[kind]
    model, guide = toy.pair(subsample)
    estimator = capturing(estimator)
    loss, found = gradient(estimator, model, guide, DATA)
    c = estimator.captured
    draws = [(c["g"][s], c["z"][s], c["data"][s]) for s in range(len(c["g"]))]
    scale = N / (subsample or N)
    p = toy.parameters()
    by_hand = -sum(elbo(toy, p, *draw, scale) for draw in draws) / len(draws)
    assert loss == pytest.approx(by_hand.item(), rel=1e-12)
    return toy, found, draws, scale


def elbo(toy, p, g, z, i, scale):
    of_g, of_z, of_y = toy.terms(p, g, z, i)
    return of_g + scale * (of_z + of_y).sum()


def assert_same(found, surrogates, p):
    """The gradient of minus the mean of the surrogates, one per particle."""
    loss = -sum(surrogates) / len(surrogates)
    expected = torch.autograd.grad(loss, list(p.values()), allow_unused=True)
    for (name, leaf), right in zip(p.items(), expected, strict=True):
        right = torch.zeros_like(leaf) if right is None else right
        mine = torch.zeros_like(leaf) if found[name] is None else found[name]
        torch.testing.assert_close(mine, right, rtol=1e-4, atol=1e-10)


@PARTICLES
def test_reparam_agrees_with_a_calculation_by_hand(subsample, particles):
    toy, found, draws, scale = step(vi.Reparam(particles), "continuous", subsample)
    p = toy.parameters()
    assert_same(found, [elbo(toy, p, *toy.redraw(p, g, z, i), i, scale) for g, z, i in draws], p)


@PARTICLES
def test_the_path_derivative_agrees_with_a_calculation_by_hand(subsample, particles):
    toy, found, draws, scale = step(vi.PathDerivative(particles), "continuous", subsample)
    p = toy.parameters()
    held = {k: v.detach() for k, v in p.items()}  # in log q only
    paths = [elbo(toy, held, *toy.redraw(p, g, z, i), i, scale) for g, z, i in draws]
    assert_same(found, paths, p)


@PARTICLES
def test_the_analytic_kl_agrees_with_a_calculation_by_hand(subsample, particles):
    """E_q[log p(z | g) - log q(z)] given g, by the formula for two Normals."""
    toy, model_guide = TOYS["continuous"], TOYS["continuous"].pair(subsample)
    estimator = capturing(vi.Reparam(particles, analytic_kl=True))
    _, found = gradient(estimator, *model_guide, DATA)
    assert estimator.kl == {"g": "analytic", "z": "analytic"}
    p, c, scale, surrogates = toy.parameters(), estimator.captured, N / (subsample or N), []
    for s in range(particles):
        i = c["data"][s]
        g, z = toy.redraw(p, c["g"][s], c["z"][s], i)

        def kl(q, loc):
            return (q.scale**2 + (q.loc - loc) ** 2 - 1) / 2 - q.scale.log()

        of_z = toy.likelihood(z).log_prob(DATA["y"][i]) - kl(toy.q_z(p, i), g * X[i])
        surrogates.append(scale * of_z.sum() - kl(toy.q_g(p), 0.0))
    assert_same(found, surrogates, p)


def signals(toy, p, g, z, i, scale):
    """(R of g, R of z): the terms that involve each, as constants."""
    with torch.no_grad():
        of_g, of_z, of_y = toy.terms(p, g, z, i)
        # log q(z_n) does not involve g, and neither does log p(y_n | z_n).
        prior_z = toy.prior_z(g, X[i]).log_prob(z)
        return of_g + scale * prior_z.sum(), scale * (of_z + of_y)


def score_surrogate(toy, p, g, z, i, r_g, r_z):
    return toy.q_g(p).log_prob(g) * r_g + (toy.q_z(p, i).log_prob(z) * r_z).sum()


@KINDS
@PARTICLES
def test_the_naive_score_agrees_with_a_calculation_by_hand(kind, particles, subsample):
    estimator = vi.Score(particles, rao_blackwell=False)
    toy, found, draws, scale = step(estimator, kind, subsample)
    p = toy.parameters()
    surrogates = []
    for draw in draws:
        r = elbo(toy, p, *draw, scale).detach()
        surrogates.append(score_surrogate(toy, p, *draw, r, r))
    assert_same(found, surrogates, p)


@KINDS
@PARTICLES
def test_the_rao_blackwellised_score_agrees_with_a_calculation_by_hand(kind, particles, subsample):
    toy, found, draws, scale = step(vi.Score(particles), kind, subsample)
    p = toy.parameters()
    surrogates = [score_surrogate(toy, p, *draw, *signals(toy, p, *draw, scale)) for draw in draws]
    assert_same(found, surrogates, p)


@KINDS
def test_leave_one_out_agrees_with_a_calculation_by_hand(kind, subsample):
    toy, found, draws, scale = step(vi.Score(3, vi.LeaveOneOut()), kind, subsample)
    p = toy.parameters()
    r = [signals(toy, p, *draw, scale) for draw in draws]
    surrogates = []
    for s, draw in enumerate(draws):
        others = [r[o] for o in range(3) if o != s]
        b_g, b_z = (torch.stack([o[k] for o in others]).mean(0) for k in (0, 1))
        surrogates.append(score_surrogate(toy, p, *draw, r[s][0] - b_g, r[s][1] - b_z))
    assert_same(found, surrogates, p)


@KINDS
@PARTICLES
def test_the_running_mean_is_keyed_by_datum(kind, particles, subsample):
    """Three steps: what a datum subtracts is the decayed mean of its own earlier signals."""
    toy = TOYS[kind]
    model, guide = toy.pair(subsample)
    estimator = capturing(vi.Score(particles, vi.RunningMean(0.7)))
    scale, p = N / (subsample or N), toy.parameters()
    sums = {"g": [0.0, 0.0]} | {n: [0.0, 0.0] for n in range(N)}
    for _ in range(3):
        _, found = gradient(estimator, model, guide, DATA)
        c = estimator.captured
        draws = [(c["g"][s], c["z"][s], c["data"][s]) for s in range(particles)]
        r = [signals(toy, p, *draw, scale) for draw in draws]
        rows = draws[0][2].tolist()
        b_g = sums["g"][0] / max(sums["g"][1], 1)
        b_z = torch.tensor([sums[n][0] / max(sums[n][1], 1) for n in rows], dtype=X.dtype)
        surrogates = [
            score_surrogate(toy, p, *draw, r_g - b_g, r_z - b_z)
            for draw, (r_g, r_z) in zip(draws, r, strict=True)
        ]
        assert_same(found, surrogates, p)
        means = {"g": sum(float(x[0]) for x in r) / particles}
        means |= {n: sum(float(x[1][k]) for x in r) / particles for k, n in enumerate(rows)}
        for key, mean in means.items():
            sums[key] = [0.7 * sums[key][0] + mean, 0.7 * sums[key][1] + 1]


@KINDS
@pytest.mark.parametrize("per", ["factor", "coordinate"])
def test_the_control_variate_agrees_with_a_calculation_by_hand(kind, per, subsample):
    """a* of each draw from the two other draws, with the scores by hand."""
    baseline = vi.ControlVariate(per, memory=0, least_correlation=0.3)
    toy, found, draws, scale = step(vi.Score(3, baseline), kind, subsample)
    p, scaled = toy.parameters(), {"g": 1.0, "z": scale}
    r = [dict(zip("gz", signals(toy, p, *draw, scale), strict=True)) for draw in draws]

    def scores(site, g, z, i):
        """Score with respect to each parameter of the site's distribution."""
        q = toy.q_g(p) if site == "g" else toy.q_z(p, i)
        value = g if site == "g" else z
        if toy.continuous[site]:
            u = (value - q.loc) / q.scale
            return torch.stack([u / q.scale, (u * u - 1) / q.scale]).detach()
        return (value - q.probs).detach()[None]

    surrogates = []
    used = 0
    for s, draw in enumerate(draws):
        g, z, i = draw
        surrogate = score_surrogate(toy, p, g, z, i, r[s]["g"], r[s]["z"])
        for site in "gz":
            h = [scores(site, *draws[o]) for o in range(3) if o != s]
            R = [r[o][site] / scaled[site] for o in range(3) if o != s]
            hh = sum(x * x for x in h)
            hhR = sum(x * x * y for x, y in zip(h, R, strict=True))
            hhRR = sum(x * x * y * y for x, y in zip(h, R, strict=True))
            squared = sum(x * y for x, y in zip(h, R, strict=True)).square()
            if per == "factor":
                hh, hhR, hhRR, squared = (m.sum(0) for m in (hh, hhR, hhRR, squared))
            support = hhR.square() >= 0.3 * hh * (hhRR - squared / 2)
            a = torch.where(support, hhR / hh, 0.0) * scaled[site]
            used += int(support.sum())
            q = toy.q_g(p) if site == "g" else toy.q_z(p, i)
            phi = [q.loc, q.scale] if toy.continuous[site] else [q.logits]
            mine = scores(site, *draw)
            for d, parameter in enumerate(phi):
                coefficient = a if per == "factor" else a[d]
                surrogate = surrogate - (coefficient * mine[d] * parameter).sum()
        surrogates.append(surrogate)
    assert used  # the test would pass with a = 0 throughout
    assert_same(found, surrogates, p)


@PARTICLES
def test_the_neural_baseline_agrees_with_a_calculation_by_hand(particles, subsample):
    """First step: the net as it came; m = 0 and s = 1."""
    torch.manual_seed(3)
    net = torch.nn.Linear(1, 1).double()
    baseline = {"z": vi.Neural(net, lambda data: data["x"][:, None])}
    toy, found, draws, scale = step(vi.Score(particles, baseline), "mixed", subsample)
    p, surrogates = toy.parameters(), []
    for g, z, i in draws:
        r_g, r_z = signals(toy, p, g, z, i, scale)
        b = net(X[i][:, None])[:, 0].detach() * scale
        surrogates.append(score_surrogate(toy, p, g, z, i, r_g, r_z - b))
    assert_same(found, surrogates, p)


@pytest.mark.parametrize("scored", ["g", "z"])
@PARTICLES
def test_a_choice_per_site_agrees_with_a_calculation_by_hand(scored, particles, subsample):
    toy, found, draws, scale = step(vi.Score(particles, sites=[scored]), "continuous", subsample)
    p, surrogates = toy.parameters(), []
    for g, z, i in draws:
        r_g, r_z = signals(toy, p, g, z, i, scale)
        g2, z2 = toy.redraw(p, g, z, i)
        if scored == "g":  # log q(g) has no path, and its own score has mean zero
            of_z = toy.terms(p, g, z2, i)[1] + toy.likelihood(z2).log_prob(DATA["y"][i])
            surrogates.append(scale * of_z.sum() + toy.q_g(p).log_prob(g) * r_g)
        else:
            of_g = toy.prior_g().log_prob(g2) - toy.q_g(p).log_prob(g2)
            prior_z = toy.prior_z(g2, X[i]).log_prob(z)
            surrogate = of_g + scale * prior_z.sum() + (toy.q_z(p, i).log_prob(z) * r_z).sum()
            surrogates.append(surrogate)
    assert_same(found, surrogates, p)


def test_enumerate_agrees_with_a_calculation_by_hand(subsample):
    """g captured, z summed out."""
    toy = TOYS["mixed"]
    model, guide = toy.pair(subsample)
    seen = {}

    class Capturing(vi.Enumerate):
        def _get_trace(self, *args):
            traces = super()._get_trace(*args)
            seen.update({n: s["value"] for n, s in traces[1].nodes.items() if n == "g"})
            return traces

        def _get_traces(self, model, guide, args, kwargs):
            def noting(*a, **k):
                from tests.estimators.models import Recorder

                with Recorder() as recorder:
                    out = guide(*a, **k)
                seen["data"] = recorder.values["data"]
                return out

            return super()._get_traces(model, noting, args, kwargs)

    _, found = gradient(Capturing(), model, guide, DATA)
    p, i, scale = toy.parameters(), seen["data"], N / (subsample or N)
    g, _ = toy.redraw(p, seen["g"].detach().reshape(()), None, i)
    z, wz = toy._nodes(toy.q_z(p, i))
    of_g = toy.prior_g().log_prob(g) - toy.q_g(p).log_prob(g)
    _, of_z, of_y = toy.terms(p, g, z, i)
    assert_same(found, [of_g + scale * (wz * (of_z + of_y)).sum()], p)
