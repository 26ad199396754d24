"""Which gradient estimator, on which model, and when? Variance and ELBO at equal time.

Four models: logistic regression (continuous), Gamma-Poisson factors (continuous, implicit
reparameterisation), binary factors (discrete), and, as a user's model outside the recipes, a
robust regression with an outlier indicator per datum. At the start and near the optimum; then the
ELBO that each estimator reaches in the same time.

Example::

    python -m benchmarks.gradient_variance --draws 200 --seconds 10
"""

import argparse
import math
import warnings

import pyro
import pyro.distributions as dist
import torch
from sklearn.datasets import load_diabetes, load_digits
from torch.distributions import constraints

import vi_toolkit as vi
from recipes.logistic_regression import GUIDES, load_data
from recipes.logistic_regression import model as logistic


def gamma_poisson(counts, factors=5):
    """z_nk, w_kd ~ Gamma, counts_nd ~ Poisson(sum_k z_nk w_kd): images as sums of parts."""
    n, d = counts.shape
    w = pyro.sample("w", dist.Gamma(counts.new_full((factors, d), 0.5), 0.3).to_event(2))
    with pyro.plate("images", n):
        z = pyro.sample("z", dist.Gamma(counts.new_full((factors,), 0.5), 0.5).to_event(1))
        pyro.sample("counts", dist.Poisson(z @ w + 1e-3).to_event(1), obs=counts)


def gamma_guide(counts, factors=5):
    n, d = counts.shape
    generator = torch.Generator().manual_seed(0)

    def gamma(name, *shape):  # shape and mean, which are less entangled than shape and rate
        mean = torch.rand(shape, generator=generator, dtype=counts.dtype) + 0.5
        alpha = pyro.param(f"{name} shape", torch.full_like(mean, 2.0), constraints.positive)
        mean = pyro.param(f"{name} mean", mean, constraint=constraints.positive)
        return dist.Gamma(alpha, alpha / mean)

    pyro.sample("w", gamma("w", factors, d).to_event(2))
    with pyro.plate("images", n):
        pyro.sample("z", gamma("z", n, factors).to_event(1))


def binary_factors(pixels, factors=5):
    """z_nk ~ Bernoulli, pixels_nd ~ Bernoulli(logit = b_d + sum_k z_nk w_kd)."""
    n, d = pixels.shape
    w = pyro.sample("w", dist.Normal(pixels.new_zeros(factors, d), 2.0).to_event(2))
    b = pyro.sample("b", dist.Normal(pixels.new_zeros(d), 2.0).to_event(1))
    with pyro.plate("images", n):
        z = pyro.sample("z", dist.Bernoulli(pixels.new_full((factors,), 0.3)).to_event(1))
        pyro.sample("pixels", dist.Bernoulli(logits=b + z @ w).to_event(1), obs=pixels)


def binary_guide(pixels, factors=5):
    n, d = pixels.shape
    generator = torch.Generator().manual_seed(0)

    def normal(name, *shape):
        start = 0.5 * torch.randn(shape, generator=generator, dtype=pixels.dtype)
        loc = pyro.param(f"{name} loc", start)
        scale = pyro.param(f"{name} scale", torch.full_like(start, 0.2), constraints.positive)
        return dist.Normal(loc, scale)

    pyro.sample("w", normal("w", factors, d).to_event(2))
    pyro.sample("b", normal("b", d).to_event(1))
    logits = pyro.param("z logits", torch.randn(n, factors, generator=generator).to(pixels.dtype))
    with pyro.plate("images", n):
        pyro.sample("z", dist.Bernoulli(logits=logits).to_event(1))


def robust_regression(X, y):
    """y_n ~ Normal(x_n w, sigma), or with five times the sd if n is an outlier."""
    w = pyro.sample("w", dist.Normal(X.new_zeros(X.shape[1]), 2.0).to_event(1))
    sigma = pyro.sample("sigma", dist.LogNormal(X.new_zeros(()), 1.0))
    with pyro.plate("patients", len(X)):
        outlier = pyro.sample("outlier", dist.Bernoulli(X.new_full((), 0.05)))
        pyro.sample("y", dist.Normal(X @ w, sigma * (1 + 4 * outlier)), obs=y)


def robust_guide(X, y):
    loc = pyro.param("w loc", X.new_zeros(X.shape[1]))
    scale = pyro.param("w scale", X.new_full((X.shape[1],), 0.1), constraint=constraints.positive)
    pyro.sample("w", dist.Normal(loc, scale).to_event(1))
    s = pyro.param("sigma loc", X.new_zeros(()))
    pyro.sample("sigma", dist.LogNormal(s, 0.05))
    logits = pyro.param("outlier logits", X.new_full((len(X),), -1.0))
    with pyro.plate("patients", len(X)):
        pyro.sample("outlier", dist.Bernoulli(logits=logits))


def digits(n=100):
    return torch.tensor(load_digits().data[:n])


def diabetes():
    bunch = load_diabetes()
    y = torch.tensor(bunch.target)
    X = torch.tensor(bunch.data) / bunch.data.std()
    return {"X": X, "y": (y - y.mean()) / y.std()}


def estimators(discrete=(), inputs=None):
    chosen = {}
    if not discrete:
        chosen["Reparam"] = vi.Reparam(8)
        chosen["PathDerivative"] = vi.PathDerivative(8)
    else:
        sites = list(discrete)
        chosen["Score there, leave one out"] = vi.Score(8, vi.LeaveOneOut(), sites=sites)
        chosen["Score there, nothing"] = vi.Score(8, sites=sites)
        net = torch.nn.Sequential(
            torch.nn.Linear(inputs[1], 16), torch.nn.Tanh(), torch.nn.Linear(16, 1)
        ).double()
        neural = {s: vi.Neural(net, inputs[0]) for s in sites}
        chosen["Score there, neural"] = vi.Score(8, neural, sites=sites)
    return chosen | {
        "Score, naive": vi.Score(8, rao_blackwell=False),
        "Score, Rao-Blackwell": vi.Score(8),
        "Score, running mean": vi.Score(8, vi.RunningMean()),
        "Score, a* per factor": vi.Score(8, vi.ControlVariate()),
        "Score, a* per coordinate": vi.Score(8, vi.ControlVariate("coordinate")),
        "Score, leave one out": vi.Score(8, vi.LeaveOneOut()),
    }


CASES = {
    "logistic regression, mean field (breast cancer)": (
        logistic, GUIDES["mean-field"], load_data, lambda: estimators()
    ),
    "Gamma-Poisson factors (100 digits)": (
        gamma_poisson, gamma_guide, lambda: {"counts": digits()}, lambda: estimators()
    ),
    "binary factors (100 binarised digits)": (
        binary_factors,
        binary_guide,
        lambda: {"pixels": (digits() > 7).double()},
        lambda: estimators(["z"], ("pixels", 64)),
    ),
    "a user's model: robust regression (diabetes)": (
        robust_regression, robust_guide, diabetes, lambda: estimators(["outlier"], ("X", 10))
    ),
}  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--draws", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=10.0, help="per fit at equal time")
    parser.add_argument("--steps", type=int, default=3000, help="to the optimum")
    parser.add_argument("--only", default="", help="part of a case's name")
    options = parser.parse_args()
    warnings.simplefilter("ignore", vi.ConvergenceWarning)
    for title, (model, guide, load, choose) in CASES.items():
        if options.only not in title:
            continue
        data, chosen = load(), choose()
        print(f"\n{'=' * 100}\n{title}\n")
        start = vi.gradient_report(model, guide, data, chosen, num_draws=options.draws)
        print(start, "\n")
        # The best estimator known beforehand takes the parameters to the optimum.
        best = next(iter(chosen.values()))
        common = {"optimizer": 0.02, "progress": False}
        optimum = vi.fit(model, guide, data, estimator=best, steps=options.steps, **common,
                         method="stochastic")  # fmt: skip
        report = vi.gradient_report(model, guide, data, chosen, at=optimum, num_draws=options.draws)
        print(report, "\n")
        mean, se = optimum.elbo_estimate(1000)
        print(f"ELBO after {options.steps} steps of the first: {mean:.1f} +- {se:.1f}")
        print(f"ELBO after {options.seconds:g} s each (steps = that by the cost of a gradient):")
        for name, cost in start.costs["ms per gradient"].items():
            steps = math.ceil(options.seconds / cost * 1e3)
            try:
                fit = vi.fit(model, guide, data, estimator=chosen[name], steps=steps, **common,
                             method="stochastic")  # fmt: skip
            except vi.NonFiniteError as error:
                print(f"    {name:<28} {str(error).split(chr(10))[0]}")
                continue
            mean, se = fit.elbo_estimate(1000)
            print(f"    {name:<28} {mean:12.1f} +- {se:5.1f}   {steps} steps")


if __name__ == "__main__":
    main()
