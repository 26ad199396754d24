"""The compiler is imported when it is needed, and nothing else needs it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vi_toolkit import machine_code

ROOT = Path(__file__).parents[1]


def run(script, *arguments, **environment):
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", script, str(ROOT), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg", **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_importing_the_package_does_not_import_the_compiler():
    script = """
import sys
sys.path.insert(0, sys.argv[1])
import pyro, torch
before = set(sys.modules)
import vi_toolkit
compiler = ("vi_toolkit.compiled", "torch._inductor", "torch._dynamo")
print(sorted(name for name in set(sys.modules) - before if name.startswith(compiler)))
"""
    done = run(script)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


WITHOUT = """
import sys, warnings
sys.path.insert(0, sys.argv[1])

class Blocker:
    def find_spec(self, name, *_):
        if name.startswith("vi_toolkit.compiled"):
            raise ImportError("blocked")

sys.meta_path.insert(0, Blocker())
sys.modules["vi_toolkit.compiled"] = None
import torch
torch.manual_seed(0)
import vi_toolkit as vi
from pyro.infer.autoguide import AutoNormal
from tests.models import regression, regression_data
from vi_toolkit import machine_code

data, options = regression_data(), {"progress": False}
fit = vi.fit(regression, AutoNormal, data, **options)
assert fit.method == "deterministic" and fit.converged
assert vi.diagnose(fit).reasons
try:
    vi.Reference.nuts(regression, data, chains=2, num_draws=40, warmup=50, **options)
except vi.InvalidReferenceError as error:  # too few draws to be admitted
    assert len(vi.compare(fit, error.reference).table)

options |= {"optimizer": 0.02}
assert len(vi.fit(regression, AutoNormal, data, steps=50, **options).elbo) == 50
assert len(vi.fit(regression, AutoNormal, data, steps=50, restarts=2, **options).restarts) == 2

machine_code.LONG_RUN = 40
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    fit = vi.fit(regression, AutoNormal, data, steps=50, **options)
    fit.extend(50)
assert [w.category for w in caught] == [vi.CompileWarning], caught
print("auto:", caught[0].message)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    fit = vi.fit(regression, AutoNormal, data, steps=50, restarts=2, **options)
assert len(fit.restarts) == 2 and {w.category for w in caught} == {vi.CompileWarning}, caught
for insisting in (
    lambda: vi.fit(regression, AutoNormal, data, steps=20, compile=True, **options),
    lambda: vi.fit(regression, AutoNormal, data, compile=True, progress=False),
):
    try:
        insisting()
    except vi.CompileError as error:
        print("insisting:", error)
"""


def test_without_the_compiler_everything_runs_eagerly():
    done = run(WITHOUT)
    assert done.returncode == 0, done.stderr[-3000:]
    auto, *insisting = done.stdout.splitlines()
    assert auto.startswith("auto: The steps run eagerly, because the compiler cannot be imported")
    assert len(insisting) == 2
    for line in insisting:
        assert line.startswith("insisting: compile=True, but the compiler cannot be imported")


def test_deprecations_inside_torch_do_not_reach_the_user(tmp_path):
    """Newer versions show the deprecation of ``torch.jit.script`` to everybody (FutureWarning)."""
    script = """
import sys, types, warnings
sys.path.insert(0, sys.argv[1])
import torch
import torch.jit._script as jit
seen = []

def warn(text, *_, **__):
    seen.append(text)
    warnings.warn(text, FutureWarning, stacklevel=3)

jit.warnings = types.SimpleNamespace(warn=warn)
import vi_toolkit as vi
from pyro.infer.autoguide import AutoNormal
from tests.models import regression, regression_data
vi.fit(regression, AutoNormal, regression_data(), progress=False)  # its Hessians use torch's script
before = len(seen)
fit = vi.fit(regression, AutoNormal, regression_data(), steps=30, compile=True, optimizer=0.02,
             progress=False)
print(before, len(seen), fit.run.stages.stepper.compiles)
"""
    done = run(script, TORCHINDUCTOR_CACHE_DIR=str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    deterministic, both, compiles = done.stdout.split()
    assert 0 < int(deterministic) < int(both) and compiles == "True"


@pytest.mark.parametrize(
    ("mode", "steps", "device", "pays"),
    [
        ("auto", None, "cpu", True),
        ("auto", 700, "cpu", True),
        ("auto", 600, "cpu", False),
        (True, 10, "cpu", True),
        (True, 10, "meta", False),
        (False, None, "cpu", False),
    ],
)
def test_when_restarts_are_taken_at_once(mode, steps, device, pays):
    leaves = [torch.zeros(100, device=device)]
    assert machine_code.batching_pays(mode, steps, 3, leaves) == pays
    many = [torch.zeros(2**19, device=device)]
    assert not machine_code.batching_pays(mode, steps, 3, many)
