"""Machine code on disk: shared by processes, never by different graphs."""

import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal

import vi_toolkit as vi
from tests.compiled.checks import interpret
from tests.compiled.models import DATA, X, Y, regression
from vi_toolkit.compiled import aot_cache, steps


def test_a_cache_folder_that_cannot_be_written(monkeypatch, tmp_path):
    torch.optim.Adam([torch.zeros(1)])  # the first one imports what wants a folder itself
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(aot_cache, "_loaded", type(aot_cache._loaded)())
    with pytest.raises(vi.CompileError, match="TORCHINDUCTOR_CACHE_DIR"):
        vi.fit(regression, AutoNormal, DATA, steps=5, compile=True, progress=False)


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="no owners of files here")
def test_machine_code_in_the_folder_of_another_user_is_not_loaded(monkeypatch, tmp_path):
    (tmp_path / "vi_toolkit").mkdir()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(aot_cache, "_loaded", type(aot_cache._loaded)())
    other = os.getuid() + 1
    monkeypatch.setattr(os, "getuid", lambda: other)
    if (tmp_path / "vi_toolkit").stat().st_uid == 0:
        monkeypatch.setattr(aot_cache, "_TRUSTED", ())
    with pytest.raises(vi.CompileError, match="belongs to another user"):
        vi.fit(regression, AutoNormal, DATA, steps=5, compile=True, progress=False)


SCRIPT = """
import json, sys, warnings
sys.path.insert(0, {root!r})
import torch
torch.set_num_threads(1)
import vi_toolkit as vi
from vi_toolkit import machine_code
from pyro.infer.autoguide import AutoNormal
from tests.models import regression, regression_data
machine_code.LONG_RUN = 1
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always", vi.CompileWarning)
    fit = vi.fit(regression, AutoNormal, regression_data(), steps={steps}, progress=False,
                 optimizer=0.02, compile={compile!r})
print(json.dumps({{"elbo": fit.elbo.tolist(), "compiled": fit.run.stages.stepper.compiles,
                   "warnings": [str(w.message) for w in caught
                                if issubclass(w.category, vi.CompileWarning)]}}))
"""


def process(compile, number, **environment):
    root = str(Path(__file__).parents[2])
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT.format(root=root, steps=number, compile=compile)],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        text=True,
    )


def result(started):
    out, _ = started.communicate(timeout=300)
    assert started.returncode == 0
    return json.loads(out.splitlines()[-1])


def test_two_processes_at_once_and_a_third_that_finds_their_library(tmp_path):
    cache = str(tmp_path / "cache")
    first, second = (process(True, 200, TORCHINDUCTOR_CACHE_DIR=cache) for _ in range(2))
    results = [result(first), result(second)]
    assert all(r["compiled"] and not r["warnings"] for r in results)
    assert results[0]["elbo"] == results[1]["elbo"]
    libraries = list((tmp_path / "cache" / "vi_toolkit").glob("*/step.so"))
    assert len(libraries) == 1
    # With the library in the cache not even a compiler is needed.
    third = result(
        process(True, 200, TORCHINDUCTOR_CACHE_DIR=cache, CXX="/does/not/exist", PATH="/nowhere")
    )
    assert third["compiled"] and third["elbo"] == results[0]["elbo"]
    assert list((tmp_path / "cache" / "vi_toolkit").glob("*")) == [libraries[0].parent]


def test_without_a_compiler_the_fit_is_eager_and_says_so(tmp_path):
    nothing = {"CXX": "/does/not/exist", "PATH": "/nowhere"}
    auto = process("auto", 200, TORCHINDUCTOR_CACHE_DIR=str(tmp_path), **nothing)
    eager = process(False, 200)
    auto, eager = result(auto), result(eager)
    assert len(auto["warnings"]) == 1 and "no working C++ compiler" in auto["warnings"][0]
    assert auto["elbo"] == eager["elbo"]


def test_many_fits_share_one_library_and_leave_nothing_behind():
    def fit():
        vi.fit(regression, AutoNormal, DATA, steps=12, compile=True, progress=False)
        gc.collect()
        loops = sum(type(o) is steps.Loop for o in gc.get_objects())
        return len(aot_cache._loaded), loops, len(gc.get_objects())

    fit()
    libraries, _, objects = fit()
    for _ in range(6):
        last = fit()
    assert last[0] == libraries and last[1] == 0
    assert last[2] - objects < 60  # ten a fit: a graph's text kept in torch.fx is four objects


def test_a_library_is_never_used_for_another_graph(monkeypatch):
    """Same model function, other constants or shapes: other keys."""
    keys = []
    original = aot_cache._key
    monkeypatch.setattr(
        steps,
        "compile_loop",
        lambda *a: (keys.append(original("loop", a[0], [*a[1], *a[2]])), interpret(*a))[1],
    )

    def model(X, y, scale):
        w = pyro.sample("w", dist.Normal(0.0, scale).expand([3]).to_event(1))
        with pyro.plate("data", len(X)):
            pyro.sample("y", dist.Normal(X @ w, 1.0), obs=y)

    for n, scale in ((30, 1.0), (30, 1.0), (30, 2.0), (20, 1.0)):
        data = {"X": X[:n], "y": Y[:n], "scale": scale}
        vi.fit(model, AutoNormal, data, steps=5, compile=True, progress=False)
    assert keys[0] == keys[1] and len(set(keys)) in (2, 3)
    assert keys[3] != keys[0]
