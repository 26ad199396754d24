"""How long does one SVI step take? Pyro, Pyro's JIT, compiled steps and NumPyro, side by side.

Every model is written twice, for Pyro and for NumPyro, with the same guide family, Adam and the
same minibatch size. The variants take turns in one process (so that a busy machine slows all of
them), each turn is timed as a whole, and medians and quartiles over the turns are reported in
microseconds per step, with ratios of medians. Compilation is timed apart: from nothing, and once
more in a second process.

Example::

    python -m benchmarks.step_time --models logistic,schools --threads 1 --rounds 11
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.infer import SVI, JitTrace_ELBO, Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal

from vi_toolkit.compiled import CompiledSteps
from vi_toolkit.programs.isolation import isolated_pyro_state, seeded_state
from vi_toolkit.programs.leaves import unique_leaves
from vi_toolkit.programs.minibatches import Minibatches, PlatePlan

RATE = 0.01
BLOCK = 256  # steps per call, of ours and of lax.scan
TURN = 0.15  # seconds a turn should last


class Problem(NamedTuple):
    """One line of the table: the same model and guide for both libraries.

    Attributes:
        data: numpy arrays, keyword arguments of all four functions.
        model, guide: Pyro's; the guide takes the model.
        peer: () -> (model, guide) of NumPyro.
        particles: Monte Carlo samples per gradient, vectorised.
        plan: (plate, size, batch) of a subsampled plate, or None.
    """

    data: dict[str, np.ndarray]
    model: Callable[..., Any]
    guide: Callable[[Any], Any]
    peer: Callable[[], tuple[Any, Any]]
    particles: int = 1
    plan: tuple[str, int, int] | None = None


# ---------------------------------------------------------------- the models


def logistic(
    n: int, d: int, particles: int = 1, batch: int | None = None, rank: str = ""
) -> Problem:
    random = np.random.default_rng(0)
    X = random.normal(size=(n, d)).astype(np.float32)
    y = (random.random(n) < 1 / (1 + np.exp(-X @ random.normal(size=d) / d**0.5))).astype(
        np.float32
    )

    def model(X: torch.Tensor, y: torch.Tensor) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([d]).to_event(1))
        b = pyro.sample("b", dist.Normal(0.0, 5.0))
        with pyro.plate("data", n, subsample_size=batch) as i:
            rows, seen = (X, y) if batch is None else (X[i], y[i])
            scores = rows @ w if w.dim() == 1 else (w @ rows.T).squeeze(-2)
            pyro.sample("y", dist.Bernoulli(logits=scores + b), obs=seen)

    def peer() -> tuple[Any, Any]:
        import numpyro
        import numpyro.distributions as ndist
        from numpyro.infer import autoguide

        def model(X: Any, y: Any, rows: Any = None) -> None:
            w = numpyro.sample("w", ndist.Normal(0.0, 1.0).expand([d]).to_event(1))
            b = numpyro.sample("b", ndist.Normal(0.0, 5.0))
            if rows is not None:
                X, y = X[rows], y[rows]
            with numpyro.plate("data", n, subsample_size=batch, dim=-1):
                numpyro.sample("y", ndist.Bernoulli(logits=X @ w + b), obs=y)

        kind = autoguide.AutoMultivariateNormal if rank == "full" else autoguide.AutoNormal
        return model, kind(model)

    guide = AutoMultivariateNormal if rank == "full" else AutoNormal
    plan = None if batch is None else ("data", n, batch)
    return Problem({"X": X, "y": y}, model, guide, peer, particles, plan)


def schools() -> Problem:
    y = np.array([28, 8, -3, 7, -1, 1, 18, 12], np.float32)
    sd = np.array([15, 10, 16, 11, 9, 11, 10, 18], np.float32)

    def model(y: torch.Tensor, sd: torch.Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(5.0))
        with pyro.plate("schools", 8):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(mu + tau * z, sd), obs=y)

    def peer() -> tuple[Any, Any]:
        import numpyro
        import numpyro.distributions as ndist
        from numpyro.infer.autoguide import AutoNormal

        def model(y: Any, sd: Any) -> None:
            mu = numpyro.sample("mu", ndist.Normal(0.0, 5.0))
            tau = numpyro.sample("tau", ndist.HalfCauchy(5.0))
            with numpyro.plate("schools", 8):
                z = numpyro.sample("z", ndist.Normal(0.0, 1.0))
                numpyro.sample("y", ndist.Normal(mu + tau * z, sd), obs=y)

        return model, AutoNormal(model)

    return Problem({"y": y, "sd": sd}, model, AutoNormal, peer)


def deep_exponential_family() -> Problem:
    """Sparse Gamma DEF, 100-30-15 units, 1,000 documents of 2,000 terms, log-normal guide."""
    documents, terms, batch, units = 1_000, 2_000, 64, (100, 30, 15)
    counts = np.random.default_rng(0).poisson(0.1, size=(documents, terms)).astype(np.float32)
    sizes = list(zip(units, (terms, *units[:-1]), strict=True))

    def model(counts: torch.Tensor) -> None:
        weights = [
            pyro.sample(f"w{k}", dist.Gamma(0.1, 0.3).expand(s).to_event(2))
            for k, s in enumerate(sizes)
        ]
        with pyro.plate("documents", documents, subsample_size=batch) as i:
            z = pyro.sample("z2", dist.Gamma(0.1, 0.1).expand([units[2]]).to_event(1))
            for k in (1, 0):
                rate = 0.1 / (z @ weights[k + 1])
                z = pyro.sample(f"z{k}", dist.Gamma(0.1, rate).to_event(1))
            pyro.sample("x", dist.Poisson(z @ weights[0]).to_event(1), obs=counts[i])

    def guide(counts: torch.Tensor) -> None:
        def site(name: str, shape: tuple[int, ...], event: int, i: Any = None) -> None:
            loc = pyro.param(f"{name} loc", lambda: torch.full(shape, -1.0))
            sd = pyro.param(
                f"{name} sd",
                lambda: torch.full(shape, 0.3),
                constraint=constraints.softplus_positive,
            )
            if i is not None:
                loc, sd = loc[i], sd[i]
            pyro.sample(name, dist.LogNormal(loc, sd).to_event(event))

        for k, shape in enumerate(sizes):
            site(f"w{k}", shape, 2)
        with pyro.plate("documents", documents, subsample_size=batch) as i:
            for k in (2, 1, 0):
                site(f"z{k}", (documents, units[k]), 1, i)

    def peer() -> tuple[Any, Any]:
        import jax.numpy as jnp
        import numpyro
        import numpyro.distributions as ndist
        from numpyro.distributions import constraints

        def model(counts: Any, rows: Any) -> None:
            weights = [
                numpyro.sample(f"w{k}", ndist.Gamma(0.1, 0.3).expand(s).to_event(2))
                for k, s in enumerate(sizes)
            ]
            with numpyro.plate("documents", documents, subsample_size=batch, dim=-1):
                z = numpyro.sample("z2", ndist.Gamma(0.1, 0.1).expand([units[2]]).to_event(1))
                for k in (1, 0):
                    rate = 0.1 / (z @ weights[k + 1])
                    z = numpyro.sample(f"z{k}", ndist.Gamma(0.1, rate).to_event(1))
                numpyro.sample("x", ndist.Poisson(z @ weights[0]).to_event(1), obs=counts[rows])

        def guide(counts: Any, rows: Any) -> None:
            def site(name: str, shape: tuple[int, ...], event: int, i: Any = None) -> None:
                loc = numpyro.param(f"{name} loc", jnp.full(shape, -1.0))
                sd = numpyro.param(
                    f"{name} sd", jnp.full(shape, 0.3), constraint=constraints.softplus_positive
                )
                if i is not None:
                    loc, sd = loc[i], sd[i]
                numpyro.sample(name, ndist.LogNormal(loc, sd).to_event(event))

            for k, shape in enumerate(sizes):
                site(f"w{k}", shape, 2)
            with numpyro.plate("documents", documents, subsample_size=batch, dim=-1):
                for k in (2, 1, 0):
                    site(f"z{k}", (documents, units[k]), 1, rows)

        return model, guide

    return Problem(
        {"counts": counts}, model, lambda m: guide, peer, 1, ("documents", documents, batch)
    )


PROBLEMS: dict[str, tuple[str, Callable[[], Problem]]] = {
    "logistic": ("logistic 1,000 x 20", lambda: logistic(1_000, 20)),
    "schools": ("eight schools, non-centred", schools),
    "minibatch": ("logistic 100,000 x 50, minibatch 256", lambda: logistic(100_000, 50, batch=256)),
    "def": ("sparse Gamma DEF 100-30-15, 64 x 2,000", deep_exponential_family),
    "particles10": ("logistic, 10 particles", lambda: logistic(1_000, 20, particles=10)),
    "particles100": ("logistic, 100 particles", lambda: logistic(1_000, 20, particles=100)),
    "full20": ("logistic, full rank, d = 20", lambda: logistic(1_000, 19, rank="full")),
    "full200": ("logistic, full rank, d = 200", lambda: logistic(1_000, 199, rank="full")),
}


# ---------------------------------------------------------------- the variants

Turn = Callable[[int], None]  # takes so many steps


def elbo(kind: type, particles: int) -> Any:
    many = {"vectorize_particles": True, "max_plate_nesting": 1} if particles > 1 else {}
    return kind(num_particles=particles, **many)


def whole_batches(plan: tuple[str, int, int]) -> Minibatches:
    """Full minibatches only: a short last one has another shape, which no peer would take."""
    _, size, batch = plan
    return Minibatches(size // batch * batch, batch, torch.Generator().manual_seed(0))


def rows_of(problem: Problem) -> Callable[[], dict[str, Any]]:
    """Subsampling for plain Pyro: one minibatch's handler, by cheap indices."""
    if problem.plan is None:
        return dict
    batches = whole_batches(problem.plan)
    return lambda: {"rows": batches.next()}


def eager(problem: Problem, data: dict[str, torch.Tensor], jit: bool, validate: bool) -> Turn:
    """Pyro as its users run it: ``SVI.step`` with Pyro's Adam."""
    plan = None if problem.plan is None else PlatePlan(*problem.plan, cut=None)
    draw = rows_of(problem)
    store = pyro.get_param_store().__class__()
    with isolated_pyro_state(store, seeded_state(0)):
        guide = problem.guide(problem.model)
        kind = JitTrace_ELBO if jit else Trace_ELBO
        loss = elbo(kind, problem.particles)
        if jit:
            loss.ignore_jit_warnings = True
        svi = SVI(problem.model, guide, pyro.optim.Adam({"lr": RATE}), loss)

    def turn(steps: int) -> None:
        with isolated_pyro_state(store, validate=validate):
            for _ in range(steps):
                handler: Any = contextlib.nullcontext()
                if plan is not None:
                    _, handler = plan.apply(data, draw()["rows"])
                with handler:
                    svi.step(**data)

    return turn


@dataclass
class Parts:
    """What our steps are made of, see ``vi_toolkit.compiled.running_fit.FitParts``."""

    model: Callable[..., Any]
    guide: Callable[..., Any]
    data: Mapping[str, Any]
    estimator: Any
    optimizer: torch.optim.Optimizer
    plan: PlatePlan | None
    leaves: list[torch.Tensor]

    def next_rates(self, steps: int) -> None:
        """No learning-rate schedule."""


def compiled(problem: Problem, data: dict[str, torch.Tensor]) -> Turn:
    """Ours: blocks of compiled steps, with the sums that iterate averaging needs."""
    plan = None if problem.plan is None else PlatePlan(*problem.plan, cut=None)
    batches = None if problem.plan is None else whole_batches(problem.plan)
    store = pyro.get_param_store().__class__()
    loss = elbo(Trace_ELBO, problem.particles)
    with isolated_pyro_state(store, seeded_state(0)):
        guide = problem.guide(problem.model)
        handler: Any = contextlib.nullcontext()
        if plan is not None:
            if hasattr(guide, "create_plates"):
                guide.create_plates = lambda *a, **k: pyro.plate(plan.name, plan.size, dim=-1)
            _, handler = plan.apply(data, torch.arange(plan.batch))
        with handler:
            loss.loss_and_grads(problem.model, guide, **data)
        leaves = unique_leaves()
        optimizer = torch.optim.Adam(leaves, lr=RATE)
        optimizer.step()
        parts = Parts(problem.model, guide, data, loss, optimizer, plan, leaves)
        steps = CompiledSteps(parts)
        steps.loop(None if plan is None else plan.batch)

    def turn(number: int) -> None:
        with isolated_pyro_state(store):
            while number > 0:
                many = min(number, BLOCK)
                steps.advance(many, batches.several(many) if batches else None)
                number -= many

    return turn


def peers(problem: Problem) -> dict[str, Turn]:
    """NumPyro, one jitted update per call, and ``lax.scan`` over many."""
    import jax
    import numpyro
    from jax import lax
    from numpyro.infer import SVI, Trace_ELBO

    model, guide = problem.peer()
    svi = SVI(model, guide, numpyro.optim.Adam(RATE), Trace_ELBO(num_particles=problem.particles))
    data = {k: jax.numpy.asarray(v) for k, v in problem.data.items()}

    def rows(key: Any) -> dict[str, Any]:
        if problem.plan is None:
            return {}
        _, size, batch = problem.plan
        return {"rows": jax.random.randint(key, (batch,), 0, size)}

    def one(state: Any, key: Any) -> tuple[Any, Any]:
        return svi.update(state, **data, **rows(key))

    key = jax.random.PRNGKey(0)
    start = svi.init(key, **data, **rows(key))
    single = jax.jit(one)
    many = jax.jit(lambda state, keys: lax.scan(one, state, keys))
    states = {"loop": start, "scan": start, "key": key}

    def keys(number: int) -> Any:  # new ones at each call: other minibatches
        states["key"], now = jax.random.split(states["key"])
        return jax.random.split(now, number)

    def loop(steps: int) -> None:
        for k in keys(steps):
            states["loop"], loss = single(states["loop"], k)
        loss.block_until_ready()

    def scan(steps: int) -> None:
        for _ in range(-(-steps // BLOCK)):
            states["scan"], losses = many(states["scan"], keys(BLOCK))
        losses.block_until_ready()

    return {"NumPyro loop": loop, "NumPyro scan": scan}


# ---------------------------------------------------------------- measuring


def measure(name: str, rounds: int) -> dict[str, Any]:
    """Quartiles of microseconds per step of every variant, and seconds to build each."""
    problem = PROBLEMS[name][1]()
    data = {k: torch.as_tensor(v) for k, v in problem.data.items()}
    makers: dict[str, Callable[[], Turn]] = {
        "Pyro": lambda: eager(problem, data, jit=False, validate=True),
        "Pyro JIT": lambda: eager(problem, data, jit=True, validate=True),
        "compiled": lambda: compiled(problem, data),
    }
    turns: dict[str, Turn] = {}
    build: dict[str, float] = {}
    why_not: dict[str, str] = {}
    for label, make in makers.items():
        began = time.perf_counter()
        try:
            turns[label] = make()
            turns[label](1)
        except Exception as error:
            turns.pop(label, None)
            why_not[label] = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
        build[label] = time.perf_counter() - began
    began = time.perf_counter()
    try:
        turns |= peers(problem)
        for label in ("NumPyro loop", "NumPyro scan"):
            turns[label](1)
        build["NumPyro"] = time.perf_counter() - began
    except ImportError as error:
        why_not["NumPyro"] = f"not installed ({error})"
    steps = {}
    for label, turn in turns.items():
        whole = BLOCK if label in ("compiled", "NumPyro scan") else 1
        turn(whole)
        began = time.perf_counter()
        turn(whole)
        one = (time.perf_counter() - began) / whole
        steps[label] = whole * max(1, round(TURN / one / whole))
    times: dict[str, list[float]] = {label: [] for label in turns}
    for _ in range(rounds):
        for label, turn in turns.items():
            began = time.perf_counter()
            turn(steps[label])
            times[label].append((time.perf_counter() - began) / steps[label] * 1e6)
    quartiles = {k: np.percentile(v, [25, 50, 75]).tolist() for k, v in times.items()}
    return {"quartiles": quartiles, "build": build, "why_not": why_not}


def show(name: str, result: dict[str, Any]) -> None:
    quartiles = result["quartiles"]
    ours = quartiles.get("compiled", [np.nan] * 3)[1]
    print(f"\n{PROBLEMS[name][0]}")
    print(f"  {'':14}{'quartile':>10}{'median':>10}{'quartile':>10}   ours is faster by")
    for label, (low, median, high) in quartiles.items():
        ratio = "" if label == "compiled" else f"{median / ours:>8.2f}x"
        print(f"  {label:14}{low:>10.1f}{median:>10.1f}{high:>10.1f}   {ratio}")
    built = ", ".join(f"{k} {v:.1f} s" for k, v in result["build"].items())
    print(f"  until the first step has run: {built}")
    for label, reason in result["why_not"].items():
        print(f"  {label}: {reason}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", default=",".join(PROBLEMS))
    parser.add_argument("--threads", default="1", help="such as 1,2")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--cold", action="store_true", help="compile into an empty cache folder")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        torch.set_num_threads(int(options.threads))
        warnings.simplefilter("ignore")
        print(json.dumps(measure(options.worker, options.rounds)))
        return
    for threads in options.threads.split(","):
        print(f"\n{threads} thread{'s' * (threads != '1')}, microseconds per step")
        for name in options.models.split(","):
            flags = f"--xla_cpu_multi_thread_eigen={str(threads != '1').lower()}"
            flags += f" intra_op_parallelism_threads={threads}"
            environment = {
                **os.environ,
                "OMP_NUM_THREADS": threads,
                "XLA_FLAGS": flags,
                "JAX_PLATFORMS": "cpu",
            }
            command = [sys.executable, "-m", "benchmarks.step_time", "--worker", name]
            command += ["--threads", threads, "--rounds", str(options.rounds)]
            with tempfile.TemporaryDirectory() as folder:
                if options.cold:
                    environment["TORCHINDUCTOR_CACHE_DIR"] = folder
                done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
            if done.returncode:
                print(f"\n{PROBLEMS[name][0]}: failed")
                continue
            show(name, json.loads(done.stdout.splitlines()[-1]))


if __name__ == "__main__":
    main()
