"""Independent starts of a stochastic fit, in turn or all in one compiled loop."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator, Sequence

from tqdm.auto import tqdm

from vi_toolkit import machine_code
from vi_toolkit.errors import CompileError, CompileWarning, NonFiniteError
from vi_toolkit.look import Callback
from vi_toolkit.programs.workspace import Workspace
from vi_toolkit.stochastic.run import Settings, StochasticRun
from vi_toolkit.stochastic.stages import MOST_COMPILED_STEPS

Failed = Callable[[StochasticRun, NonFiniteError], None]


def run_restarts(
    workspace: Workspace,
    settings: Settings,
    steps: int | None,
    seeds: Sequence[int],
    callback: Callback | None,
    show: bool,
    failed: Failed,
) -> tuple[list[StochasticRun], bool]:
    """Fits from several seeds; returns them and whether Ctrl-C ended them.

    They run in one compiled loop where that pays and works, else one after the other.

    Args:
        workspace: set up from the first seed; each further seed gets one of its own.
        failed: told which run met a non-finite number, before the error goes up.
    """
    leaves = list(workspace.values.values())
    pays = machine_code.batching_pays(settings.compile, steps, len(seeds), leaves)
    if len(seeds) > 1 and callback is None and pays:
        try:
            return _at_once(_begin(workspace, settings, seeds), steps, show, failed)
        except CompileError as error:
            warnings.warn(
                f"The restarts run one after the other, because {error}.",
                CompileWarning,
                stacklevel=4,
            )
            workspace = workspace.unused(seeds[0])
            workspace.set_up()
    runs = []
    for k, seed in enumerate(seeds):
        (run,) = _begin(workspace if k == 0 else _another(workspace, seed), settings, [seed])
        runs.append(run)
        description = f"fit {k + 1}/{len(seeds)}" if len(seeds) > 1 else "fit"
        try:
            if run.start(steps, description, show, callback):
                return runs, True
            run.look_for_jumps()
        except NonFiniteError as error:
            failed(run, error)
            raise
    return runs, False


def _another(workspace: Workspace, seed: int) -> Workspace:
    other = workspace.unused(seed)
    other.set_up()
    return other


def _begin(workspace: Workspace, settings: Settings, seeds: Sequence[int]) -> list[StochasticRun]:
    """Runs from these seeds, the first in the given workspace, with no step taken."""
    return [
        StochasticRun(workspace if k == 0 else _another(workspace, seed), seed, settings)
        for k, seed in enumerate(seeds)
    ]


def _at_once(
    runs: list[StochasticRun], steps: int | None, show: bool, failed: Failed
) -> tuple[list[StochasticRun], bool]:
    """All fits in one compiled loop.

    Raises:
        CompileError: they cannot share one; all of them have been modified.
    """

    present = 0

    @contextlib.contextmanager
    def isolated(k: int) -> Iterator[None]:
        nonlocal present
        present = k
        with runs[k].workspace.in_store():
            yield

    bar = tqdm(total=steps, disable=not show, desc=f"{len(runs)} fits", unit="step")

    def report(done: int, error: float) -> None:
        bar.update(done)
        if math.isfinite(error):
            bar.set_postfix_str(f"error {error:.2f} posterior sds", refresh=False)

    interrupted, error = False, None
    try:
        batched = machine_code.batched_fits(
            [run.stages for run in runs], isolated, MOST_COMPILED_STEPS
        )
        batched.advance(steps, report)
    except KeyboardInterrupt:
        interrupted = True
    except NonFiniteError as raised:
        error = raised
        raise
    finally:
        bar.close()
        last = present
        for k, run in enumerate(runs):
            with isolated(k):
                run.report_average()
        if error is not None:
            failed(runs[last], error)
    if not interrupted:
        runs[0].look_for_jumps()
    return runs, interrupted
