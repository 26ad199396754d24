"""What do K restarts cost, taken at once? Steps, and whole fits.

Steps: microseconds per compiled step of all K fits at once, next to that of one fit and to
NumPyro's ``lax.scan`` under ``vmap``; turns interleaved in one process, medians.
Fits: seconds of ``vi.fit(..., steps=2_000, restarts=K)`` with the machine code on disk already, all
restarts at once, one after the other, and eagerly.

Example::

    python -m benchmarks.restarts --threads 1 --rounds 7
"""

from __future__ import annotations

import argparse
import os
import time
import warnings
from typing import Any

import numpy as np
import pyro
import torch
from pyro.infer import Trace_ELBO

import vi_toolkit as vi
from benchmarks.step_time import BLOCK, PROBLEMS, RATE, TURN, Problem, Turn
from vi_toolkit.compiled import CompiledSteps
from vi_toolkit.programs.isolation import isolated_pyro_state, seeded_state
from vi_toolkit.programs.leaves import unique_leaves

MANY = (1, 4, 10, 32, 100)
STEPS = 2_000


class Start:
    """A fit at its start, after one step of its optimiser."""

    def __init__(self, problem: Problem, data: dict[str, torch.Tensor], seed: int):
        self.model, self.data, self.plan = problem.model, data, None
        self.store = pyro.get_param_store().__class__()
        self.estimator: Any = Trace_ELBO()
        with isolated_pyro_state(self.store, seeded_state(seed)):
            self.guide = problem.guide(problem.model)
            self.estimator.loss_and_grads(problem.model, self.guide, **data)
            self.leaves = unique_leaves()
            self.optimizer = torch.optim.Adam(self.leaves, lr=RATE)
            self.optimizer.step()

    def next_rates(self, steps: int) -> None:
        """No learning-rate schedule."""


def ours(problem: Problem, data: dict[str, torch.Tensor], restarts: int) -> Turn:
    first, *others = (Start(problem, data, seed) for seed in range(restarts))
    with isolated_pyro_state(first.store, seeded_state(0)):
        loop = CompiledSteps(first, *others).loop(None)
    total = torch.zeros(sum(p.numel() for p in first.leaves))

    def turn(number: int) -> None:
        with isolated_pyro_state(first.store):
            for _ in range(number // BLOCK):
                loop.advance(BLOCK, None, total if restarts == 1 else [total] * restarts)

    return turn


def peer(problem: Problem, restarts: int) -> Turn:
    import jax
    import numpyro
    from jax import lax
    from numpyro.infer import SVI, Trace_ELBO

    model, guide = problem.peer()
    svi = SVI(model, guide, numpyro.optim.Adam(RATE), Trace_ELBO())
    data = {k: jax.numpy.asarray(v) for k, v in problem.data.items()}
    keys = jax.random.split(jax.random.PRNGKey(0), restarts)
    state = jax.vmap(lambda key: svi.init(key, **data))(keys)

    def scan(state: Any) -> Any:
        return lax.scan(lambda s, _: svi.update(s, **data), state, None, length=BLOCK)

    many = jax.jit(jax.vmap(scan))
    kept = {"state": state}

    def turn(number: int) -> None:
        for _ in range(number // BLOCK):
            kept["state"], losses = many(kept["state"])
        losses.block_until_ready()

    return turn


def steps(name: str, rounds: int) -> None:
    problem = PROBLEMS[name][1]()
    data = {k: torch.as_tensor(v) for k, v in problem.data.items()}
    print(f"\n{PROBLEMS[name][0]}: microseconds per step")
    print(f"  {'restarts':>8}{'ours':>10}{'NumPyro':>10}{'ratio':>8}{'ours, of K times one':>24}")
    turns: dict[tuple[str, int], Turn] = {}
    for many in MANY:
        turns["ours", many] = ours(problem, data, many)
        turns["NumPyro", many] = peer(problem, many)
    number = {}
    for key, turn in turns.items():
        turn(BLOCK)
        began = time.perf_counter()
        turn(BLOCK)
        number[key] = BLOCK * max(1, round(TURN / (time.perf_counter() - began)))
    times: dict[tuple[str, int], list[float]] = {key: [] for key in turns}
    for _ in range(rounds):
        for key, turn in turns.items():
            began = time.perf_counter()
            turn(number[key])
            times[key].append((time.perf_counter() - began) / number[key] * 1e6)
    median = {key: float(np.median(values)) for key, values in times.items()}
    for many in MANY:
        mine, theirs = median["ours", many], median["NumPyro", many]
        share = mine / (many * median["ours", 1])
        print(f"  {many:8}{mine:10.1f}{theirs:10.1f}{theirs / mine:7.2f}x{share:23.0%}", flush=True)


def fits(name: str) -> None:
    problem = PROBLEMS[name][1]()
    data = {k: torch.as_tensor(v) for k, v in problem.data.items()}

    def seconds(restarts: int, **options: Any) -> float:
        began = time.perf_counter()
        vi.fit(
            problem.model,
            problem.guide(problem.model),
            data,
            steps=STEPS,
            restarts=restarts,
            progress=False,
            **options,
        )
        return time.perf_counter() - began

    print(f"\n{PROBLEMS[name][0]}: seconds of a fit of {STEPS:,} steps")
    print(f"  {'restarts':>8}{'at once':>10}{'in turn':>10}{'eager':>10}")
    seconds(1)
    for many in MANY:
        seconds(many)  # leaves its machine code on disk
        at_once = seconds(many)
        # With a callback they run one after the other.
        in_turn = seconds(many, callback=lambda look: False) if many <= 10 else float("nan")
        eager = seconds(many, compile=False) if many == 1 else float("nan")
        print(f"  {many:8}{at_once:10.1f}{in_turn:10.1f}{eager:10.1f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", default="logistic,schools,full20")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    multi = str(options.threads > 1).lower()
    os.environ["XLA_FLAGS"] = (
        f"--xla_cpu_multi_thread_eigen={multi} intra_op_parallelism_threads={options.threads}"
    )
    warnings.simplefilter("ignore")
    for name in options.models.split(","):
        steps(name, options.rounds)
    for name in options.models.split(","):
        fits(name)


if __name__ == "__main__":
    main()
