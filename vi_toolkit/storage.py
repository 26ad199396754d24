"""A fit on disk: one safetensors file, with everything that is not a tensor as JSON in its header.

Nothing is ever unpickled: safetensors holds raw numbers, JSON holds names. The model and the guide
are code and are not stored; :func:`load` takes them and checks that their parameters are the ones
in the file.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from pyro.infer import ELBO
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from vi_toolkit.deterministic.families import Diagonal, FullRank, LowRank
from vi_toolkit.deterministic.objective import FamilyProblem, GuideProblem, Problem
from vi_toolkit.deterministic.run import Progress
from vi_toolkit.errors import LoadError
from vi_toolkit.estimators import (
    ControlVariate,
    Enumerate,
    LeaveOneOut,
    PathDerivative,
    Reparam,
    RunningMean,
    Score,
)
from vi_toolkit.fitting import Fit

FORMAT = "vi_toolkit fit"
VERSION = 2
# What can be made again from numbers and names; a net (Neural) or an ELBO of Pyro's cannot.
_ESTIMATORS = {kind.__name__: kind for kind in (Reparam, PathDerivative, Score, Enumerate)}
_BASELINES = {kind.__name__: kind for kind in (RunningMean, LeaveOneOut, ControlVariate)}
_FAMILIES = {family.name: family for family in (Diagonal, FullRank, LowRank)}


def save(fit: Fit, path: str | os.PathLike[str]) -> None:
    """Write a fit to ``path`` (``.safetensors`` is appended where it is missing).

    The file appears whole or not at all. It holds the data too, so that the fit can predict and
    be continued wherever it is loaded.

    Args:
        fit: any fit, finished or interrupted.
        path: where to.

    Raises:
        TypeError: an entry of the data is neither a tensor nor something JSON can hold.
    """
    tensors: dict[str, torch.Tensor] = {}
    header = {
        "format": FORMAT,
        "version": VERSION,
        "method": fit.method,
        "why": fit.why,
        "seed": fit.seed,
        "seconds": fit.seconds,
        "interrupted": fit.interrupted,
        "restarts": fit.restarts,
        "versions": fit.versions,
        "precision": str(fit._dtype).removeprefix("torch."),
        "given precision": str(fit._user_dtype).removeprefix("torch."),
        "data": _pack(fit.data, "data", tensors),
        "params": _pack(fit._values, "param", tensors),
        "state": _pack(_state(fit), "state", tensors),
    }
    text = json.dumps(header)
    metadata = {"vi_toolkit": text, "sha256": _digest(text, tensors)}
    path = _with_suffix(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        save_file(tensors, partial, metadata)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def load(
    path: str | os.PathLike[str],
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *,
    estimator: ELBO | None = None,
    optimizer: Callable[[list[torch.Tensor]], torch.optim.Optimizer] | None = None,
) -> Fit:
    """Read a fit written by :meth:`Fit.save`.

    Args:
        path: the file.
        model, guide: what was fitted; the guide as it was given to :func:`~vi_toolkit.fit`.
        estimator, optimizer: the same, if they were given as objects; only ``extend`` needs them.

    Returns:
        The fit, which samples, predicts and extends as the saved one would have.

    Raises:
        LoadError: the file is missing, corrupt, truncated or not a fit, or belongs to another
            model or guide.
    """
    path = Path(path) if Path(path).exists() else _with_suffix(path)
    if not path.exists():
        raise LoadError(f"There is no file {path}.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise LoadError(
            f"{path} is not a readable safetensors file ({error}): it is truncated, corrupt or "
            "something else."
        ) from error
    if "vi_toolkit" not in metadata:
        raise LoadError(f"{path} is a safetensors file, but not a fit saved by vi_toolkit.")
    if _digest(metadata["vi_toolkit"], tensors) != metadata.get("sha256"):
        raise LoadError(f"{path} is corrupt: its content does not match its checksum.")
    header = json.loads(metadata["vi_toolkit"])
    if header.get("format") != FORMAT or header.get("version") != VERSION:
        raise LoadError(
            f"{path} has format {header.get('format')!r} version {header.get('version')!r}; this "
            f"vi_toolkit reads {FORMAT!r} version {VERSION}."
        )

    data = _unpack(header["data"], tensors)
    user_dtype = getattr(torch, header["given precision"])
    try:
        state = _unpack(header["state"], tensors)
        subsample = (state or {}).get("subsample")
        fit = Fit(model, guide, data, user_dtype, header["seed"], False, subsample)
        if header["precision"] != header["given precision"]:
            fit._set_up(getattr(torch, header["precision"]))
    except Exception as error:
        raise LoadError(
            f"The model and guide given do not run on the data in {path} "
            f"({type(error).__name__}: {error}): they are not the ones that were saved."
        ) from error
    params = _unpack(header["params"], tensors)
    _check_parameters(path, params, fit._initial)
    for name in ("method", "why", "seconds", "interrupted", "restarts", "versions"):
        setattr(fit, name, header[name])
    fit._values = params
    with fit._isolated(), torch.no_grad():
        for name, leaf in fit._store.named_parameters():
            leaf.copy_(params[name])
    _restore(fit, state, estimator, optimizer)
    return fit


def _check_parameters(
    path: Path, saved: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]
) -> None:
    missing, extra = sorted(set(saved) - set(expected)), sorted(set(expected) - set(saved))
    if missing or extra:
        raise LoadError(
            f"{path} belongs to another model or guide: the file has the parameters {missing} "
            f"that these lack, and lacks {extra}."
        )
    for name, value in saved.items():
        if value.shape != expected[name].shape:
            raise LoadError(
                f"{path} belongs to another model or guide: parameter {name!r} has shape "
                f"{tuple(value.shape)} in the file and {tuple(expected[name].shape)} here."
            )


def _state(fit: Fit) -> dict[str, Any] | None:
    """What :meth:`Fit.extend` needs."""
    if fit._stochastic is not None:
        return {
            "kind": "stochastic",
            "running": fit._stochastic.state() | {"iterate": fit._iterate},
            "rate": fit._optimizer if isinstance(fit._optimizer, float) else None,
            "estimator": _describe(fit._estimator),
            "subsample": fit._subsample,
            "average": fit._average,
            "compile": fit._compile,
        }
    progress = fit._progress
    if progress is None:
        return None
    state: dict[str, Any] = {
        "kind": "deterministic",
        "rounds": progress.rounds,
        "draws": progress.num_draws,
        "error": progress.error,
        "gradient": progress.gradient,
        "elbo": torch.tensor(progress.elbo, dtype=torch.float64),
    }
    problem = progress.problem
    if isinstance(problem, FamilyProblem):
        state["family"] = problem.q.name
        state["member"] = dict(vars(problem.q))
    elif isinstance(problem, GuideProblem):
        state["family"] = None
        state["member"] = {"origin": problem.origin, "basis": problem.basis}
        state["noise"] = problem.noise_dim
    return state


def _restore(
    fit: Fit,
    state: Mapping[str, Any] | None,
    estimator: ELBO | None,
    optimizer: Callable[[list[torch.Tensor]], torch.optim.Optimizer] | None,
) -> None:
    if state is None:
        return
    if state["kind"] == "stochastic":
        if estimator is None and state["estimator"] is not None:
            estimator = _make(state["estimator"])
        fit._compile = state.get("compile", "auto")
        known = state["rate"] if state["rate"] is not None else optimizer
        fit._prepare_stochastic(estimator, known, state["average"], state["subsample"])
        fit._start_stochastic(fit.seed)
        running = fit._stochastic
        assert running is not None
        running_state = state["running"]
        if known is None:
            # Without the optimiser's code its state cannot be taken up; all else can.
            running_state = running_state | {"optimizer": running.optimizer.state_dict()}
            fit._cannot_extend = "pass optimizer= to vi.load to continue this fit"
        if estimator is None:
            fit._cannot_extend = "pass estimator= to vi.load to continue this fit"
            running_state = running_state | {"estimator": {}}
        with fit._isolated():
            running.restore(running_state)  # leaves the iterate in the parameters
            for name, leaf in fit._store.named_parameters():
                with torch.no_grad():
                    leaf.copy_(fit._values[name])
        fit._iterate = state["running"]["iterate"]
        return
    member = state["member"]
    problem: Problem
    if state["family"] is not None:
        problem = FamilyProblem(fit.joint, _FAMILIES[state["family"]](**member))
    else:
        with fit._isolated():
            problem = GuideProblem(
                fit.model, fit.guide, fit._data, fit.joint, state["noise"], **member
            )
    fit._progress = Progress(
        problem,
        state["rounds"],
        state["draws"],
        state["error"],
        state["gradient"],
        state["elbo"].tolist(),
    )


def _describe(value: Any) -> Any:
    """An estimator or a baseline as names and numbers, or None where that cannot be."""
    if type(value) in _BASELINES.values():
        return {"kind": type(value).__name__, "options": value.options()}
    if type(value) not in _ESTIMATORS.values():
        return None
    options = value.options()
    baseline = options.get("baseline")
    if isinstance(baseline, Mapping):
        options["baseline"] = {site: _describe(one) for site, one in baseline.items()}
        if any(one and not options["baseline"][site] for site, one in baseline.items()):
            return None
    elif baseline is not None:
        options["baseline"] = _describe(baseline)
        if options["baseline"] is None:
            return None
    return {"kind": type(value).__name__, "options": options}


def _make(description: Mapping[str, Any]) -> Any:
    """What :func:`_describe` described."""
    options = dict(description["options"])
    baseline = options.get("baseline")
    if baseline is not None:
        single = set(baseline) == {"kind", "options"}
        options["baseline"] = (
            _make(baseline)
            if single
            else {site: one and _make(one) for site, one in baseline.items()}
        )
    return {**_ESTIMATORS, **_BASELINES}[description["kind"]](**options)


def _pack(value: Any, path: str, tensors: dict[str, torch.Tensor]) -> Any:
    """Replace tensors by references to ``tensors``; the rest must be JSON's."""
    if torch.is_tensor(value):
        tensors[path] = value.detach().cpu().contiguous().clone()
        return {"__tensor__": path}
    if isinstance(value, Mapping):
        # Keys may be numbers (the optimiser's), which JSON would turn into text.
        return {"__map__": [[k, _pack(v, f"{path}/{k}", tensors)] for k, v in value.items()]}
    if isinstance(value, (list, tuple)):
        return {
            "__list__": [_pack(v, f"{path}/{i}", tensors) for i, v in enumerate(value)],
            "tuple": isinstance(value, tuple),
        }
    if isinstance(value, float) and not math.isfinite(value):
        return {"__float__": repr(value)}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(
        f"{path} is a {type(value).__name__}, which cannot be saved: data may hold tensors, "
        "numbers, text, None, and lists and dicts of these."
    )


def _unpack(value: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    if "__tensor__" in value:
        return tensors[value["__tensor__"]]
    if "__map__" in value:
        return {k: _unpack(v, tensors) for k, v in value["__map__"]}
    if "__float__" in value:
        return float(value["__float__"])
    items = [_unpack(v, tensors) for v in value["__list__"]]
    return tuple(items) if value["tuple"] else items


def _digest(text: str, tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _with_suffix(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    return path if path.suffix == ".safetensors" else path.with_name(path.name + ".safetensors")
