"""Data that are not on the CPU: the same fits, eagerly, and all that is done with them."""

import os
import subprocess
import sys

import pytest
from torch.utils import backend_registration

SCRIPT = """
import sys, warnings
sys.path.insert(0, {root!r})
warnings.simplefilter("ignore")
import numpy as np, pyro, pyro.distributions as dist, torch
import tests.another_device
import vi_toolkit as vi
from pyro.infer.autoguide import AutoNormal

def model(X, y):
    w = pyro.sample("w", dist.Normal(X.new_zeros(3), X.new_ones(3)).to_event(1))
    with pyro.plate("data", 60) as i:
        pyro.sample("y", dist.Bernoulli(logits=X[i] @ w), obs=y[i])

torch.manual_seed(0)
X = torch.randn(60, 3)
here = {{"X": X, "y": (X.sum(1) > 0).float()}}
there = {{name: x.to("other") for name, x in here.items()}}
assert there["X"].device.type == "other"
options = dict(steps=120, optimizer=0.02, seed=5, progress=False)
for more in ({{}}, {{"subsample": {{"data": 20}}}}, {{"restarts": 2}},
             # (What depends on what cannot be seen in tensors of a class of their own.)
             {{"estimator": vi.Score(4, vi.LeaveOneOut(), rao_blackwell=False)}}):
    with warnings.catch_warnings():
        warnings.simplefilter("error", vi.CompileWarning)
        fits = [vi.fit(model, AutoNormal, data, **options, **more) for data in (here, there)]
    a, b = fits
    assert b.params["AutoNormal.locs.w"].device.type == "other"
    assert np.array_equal(a.elbo, b.elbo), (more, a.elbo[:5], b.elbo[:5])
a, b = (vi.fit(model, AutoNormal, data, **options) for data in (here, there))
assert np.array_equal(a.extend(600).elbo, b.extend(600).elbo)
assert torch.equal(a.sample(9)["w"], b.sample(9)["w"].cpu())
assert torch.equal(a.predict(4, seed=1)["y"], b.predict(4, seed=1)["y"].cpu())
assert a.elbo_estimate(20) == b.elbo_estimate(20)
found = [vi.diagnose(fit, chains=False) for fit in (a, b)]
assert found[0].reasons == found[1].reasons, found
vi.predictive_check(b), b.to_arviz(), b.plot()
draws = {{"chains": 2, "num_draws": 30, "warmup": 50, "progress": False}}
refused = []
for data in (here, there):
    try:
        vi.Reference.nuts(model, data, **draws)
    except vi.InvalidReferenceError as error:  # too few draws
        refused.append(error.reference)
vi.compare(b, refused[1])
assert np.array_equal(refused[0].mean, refused[1].mean)
b.save({folder!r} + "/fit")
c = vi.load({folder!r} + "/fit", model, AutoNormal)  # on the CPU
assert c.params["AutoNormal.locs.w"].device.type == "cpu"
assert torch.equal(a.sample(9)["w"], c.sample(9)["w"])
vi.stochastic.stages.MOST_STEPS = 100
left_open = vi.fit(model, AutoNormal, there, progress=False)
assert (left_open.method, left_open.why) == ("stochastic", "the data are on other")
try:
    vi.fit(model, AutoNormal, there, compile=True, **options)
except vi.CompileError as error:
    print(error)
"""


@pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="torch has no devices written in Python",
)
def test_a_fit_on_another_device_is_the_one_on_the_cpu(tmp_path):
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(root=root, folder=str(tmp_path))],
        env={**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "only steps on the CPU are compiled" in done.stdout
