"""Held-out log predictive density over time: VI against NUTS, 10,000 rows and 250 predictors.

The example of Kucukelbir et al., "Automatic Differentiation Variational Inference", 2017, section
5.1: a regression with automatic relevance determination, half of whose regressors are null. Both
sides run on the same model with the relevances integrated out, and on the same data: compressed
(recipes.linear_regression_ard.compress), an exact reduction from 10,000 rows to 250, or with
--whole all rows, as in the paper; there VI takes minibatches. Both have one thread. NUTS is Pyro's
with a compiled gradient; its curve is the score of all its draws so far, warmup excluded, against
all the time it has taken, warmup included.

    python -m benchmarks.ard [--whole] [--draws 200 --warmup 200]
"""

import argparse
import time
import warnings

import torch
from pyro.infer import MCMC, NUTS
from pyro.infer.autoguide import AutoNormal

import vi_toolkit as vi
from recipes.linear_regression_ard import collapsed, compress, simulate
from recipes.linear_regression_ard.evaluate import log_predictive_densities

TRAIN, TEST = 10_000, 1_000


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--draws", type=int, default=200, help="of NUTS")
    parser.add_argument("--warmup", type=int, default=200, help="of NUTS")
    parser.add_argument("--whole", action="store_true", help="all rows instead of the compressed")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    data, truth = simulate(options.seed, observations=TRAIN + TEST)
    test = {name: value[TRAIN:] for name, value in data.items()}

    rows = {name: value[:TRAIN] for name, value in data.items()}
    if not options.whole:
        began = time.process_time()
        rows = compress(**rows)
        print(f"compressing {TRAIN} rows: {time.process_time() - began:.2f} s")
    print(f"{len(rows['X'])} rows, {rows['X'].shape[1]} predictors")

    def score(draws):
        return float(log_predictive_densities(draws, **test).mean())

    truth = {name: truth[name][None] for name in ("coefficients", "variance")}
    print(
        f"true coefficients: {score(truth):.4f} nats a row\n\nCPU s  nats a row  what", flush=True
    )

    def report(seconds, value, what):
        print(f"{seconds:5.1f}  {value:10.4f}  {what}", flush=True)

    def variational(what, **settings):
        began = time.process_time()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", vi.ConvergenceWarning)  # stopped early on purpose
            fit = vi.fit(collapsed, AutoNormal, rows, seed=options.seed, progress=False, **settings)
        report(time.process_time() - began, score(fit.sample(1_000)), f"vi.fit, mean field, {what}")
        return fit

    minibatch = {"subsample": {"rows": 256}} if options.whole else {}
    for steps in (100, 1_000):
        variational(f"{steps} eager steps", steps=steps, compile=False, **minibatch)
    if options.whole:
        fit = variational("minibatches, defaults", **minibatch)
    else:
        fit = variational("deterministic, defaults")
    print(f"       {fit.convergence}")
    center = fit.sample(4_000)["coefficients"].mean(0)

    began, scoring = time.process_time(), 0.0
    kept = {"coefficients": [], "variance": []}
    shown = {1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000, 2_000}

    def watch(kernel, state, stage, i):
        nonlocal scoring
        if not stage.startswith("Sample"):
            return
        kept["coefficients"].append(state["coefficients"].clone())
        kept["variance"].append(kernel.transforms["variance"].inv(state["variance"]).clone())
        if len(kept["variance"]) in shown:
            now = time.process_time()
            value = score({name: torch.stack(values) for name, values in kept.items()})
            report(now - began - scoring, value, f"NUTS, {len(kept['variance'])} draws")
            scoring += time.process_time() - now

    torch.manual_seed(options.seed)
    kernel = NUTS(collapsed, jit_compile=True, ignore_jit_warnings=True)
    sampler = MCMC(kernel, options.draws, options.warmup, hook_fn=watch, disable_progbar=True)
    sampler.run(**rows)
    draws = sampler.get_samples()["coefficients"]
    gap = (center - draws.mean(0)) / draws.std(0)
    print(f"\nmeans, VI against NUTS: largest difference {float(gap.abs().max()):.2f} sd, where")
    print(f"{options.draws} draws have a standard error of at least {options.draws**-0.5:.2f} sd")


if __name__ == "__main__":
    main()
