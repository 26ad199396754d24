"""What does a compiled log density buy? Evaluations, a chain of NUTS, a deterministic fit.

Milliseconds of CPU for the gradient and value of the log joint density, at 16 points and at 128,
as ``Joint.gradients`` computes them with and without ``compile_joint``: medians of interleaved
rounds. Then CPU seconds of NUTS chains with the same seeds and of a deterministic fit, compilation
included, both ways.

Example::

    python -m benchmarks.density --rounds 9
    VI_BENCH_DATA=path/to/folder python -m benchmarks.density --posteriordb    # evaluations only
"""

from __future__ import annotations

import argparse
import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
from pyro.infer.autoguide import AutoMultivariateNormal

import vi_toolkit as vi
from benchmarks.posteriordb import read_json
from benchmarks.posteriordb_models import MODELS
from benchmarks.step_time import logistic, schools
from recipes import logistic_regression
from vi_toolkit.machine_code import compile_joint
from vi_toolkit.programs.joint import Joint
from vi_toolkit.reference import nuts_draws


def cpu(f: Callable[[], Any]) -> float:
    began = time.process_time()
    f()
    return time.process_time() - began


def both(joint: Joint, rows: int, rounds: int) -> tuple[float, float]:
    """Milliseconds, eager and compiled."""
    u = joint.start + 0.1 * torch.randn(rows, joint.dim, generator=torch.Generator().manual_seed(0))
    compiled, times = joint.compiled, {False: [], True: []}
    for _ in range(rounds + 1):
        for way, found in times.items():
            joint.compiled = compiled if way else None
            found.append(cpu(lambda: joint.gradients(u)))
    joint.compiled = compiled
    eager, fast = (1e3 * float(np.median(times[way][1:])) for way in (False, True))
    return eager, fast


def in_double(data: dict[str, Any]) -> dict[str, torch.Tensor]:
    tensors = {k: torch.as_tensor(v) for k, v in data.items()}
    return {k: v.double() if v.is_floating_point() else v for k, v in tensors.items()}


def evaluations(name: str, model: Any, data: dict[str, Any], rounds: int) -> None:
    joint = Joint(model, in_double(data))
    began = time.perf_counter()
    try:
        compile_joint(joint, insist=True)
    except vi.CompileError as error:
        print(f"{name:36} not compiled: {error}")
        return
    built = time.perf_counter() - began
    line = f"{name:36}{built:6.1f} s"
    for rows in (16, 128):
        eager, fast = both(joint, rows, rounds)
        line += f"{eager:11.2f}{fast:9.3f}{eager / fast:7.1f}x"
    print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--posteriordb", action="store_true", help="its evaluations only")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    pyro.enable_validation(False)
    print(f"{'':36}{'build':>8}{'16 points':>11}{'':9}{'':>8}{'128 points':>11}")
    print(f"{'':44}{'eager ms':>11}{'compiled':>9}{'':8}{'eager ms':>11}{'compiled':>9}")
    if options.posteriordb:
        folder = Path(os.environ["VI_BENCH_DATA"]) / "posteriordb" / "data"
        for name, posterior in MODELS.items():
            data = posterior.prepare(read_json(folder / f"{name.split('-', 1)[0]}.json.zip"))
            evaluations(name, posterior.model, data, options.rounds)
        return
    sizes = ((1_000, 20), (10_000, 30), (100_000, 50))
    cases = {f"logistic {n:,} x {d}": logistic(n, d) for n, d in sizes}
    evaluations("eight schools", schools().model, schools().data, options.rounds)
    for name, problem in cases.items():
        evaluations(name, problem.model, problem.data, options.rounds)

    print("\nNUTS, 2 chains of 150 + 150, CPU s        eager compiled (compilation included)")
    recipe = logistic_regression
    chains = {
        "eight schools": (schools().model, in_double(schools().data), {"target_accept": 0.95}),
        "logistic regression recipe": (recipe.model, recipe.load_data(), {"full_mass": True}),
    }
    for name, (model, data, settings) in chains.items():
        run = [
            cpu(lambda: nuts_draws(model, data, 2, 150, 150, 0, False, compile=way, **settings))  # noqa: B023
            for way in (False, True)
        ]
        print(f"{name:36}{run[0]:11.1f}{run[1]:9.1f}{run[0] / run[1]:7.1f}x", flush=True)

    print("\ndeterministic fit, full rank, CPU s       eager compiled (compilation included)")
    for name, problem in cases.items():
        data = {k: torch.as_tensor(v) for k, v in problem.data.items()}
        run = []
        for way in (False, True):
            run.append(
                cpu(
                    lambda: vi.fit(
                        problem.model,  # noqa: B023
                        AutoMultivariateNormal,
                        data,  # noqa: B023
                        compile=way,  # noqa: B023
                        progress=False,
                    )
                )
            )
        print(f"{name:36}{run[0]:11.1f}{run[1]:9.1f}{run[0] / run[1]:7.1f}x", flush=True)


if __name__ == "__main__":
    main()
