"""Side effects and changing Python values are found."""

import cProfile

import numpy as np
import torch

from vi_toolkit.compiled.purity import PythonSnapshot, effects

temperature = 1.0


def test_python_snapshots_see_globals_closures_attributes_and_containers():
    class Settings:
        beta = 1.0

    class Model:
        scale = 2.0

        def __init__(self):
            self.items = [1, 2]

        def __call__(self):
            return self.items, Settings.beta, temperature

    array = np.zeros(3)
    counter = {"n": 0}

    def function(default=[0]):  # noqa: B006
        return array, counter, default

    model = Model()
    state = PythonSnapshot(model, function)
    assert state.changed() is None
    changes = [
        lambda: model.items.append(3),
        lambda: setattr(Model, "scale", 3.0),
        lambda: setattr(Settings, "beta", 2.0),
        lambda: array.__setitem__(0, 1.0),
        lambda: counter.update(n=1),
        lambda: function.__defaults__[0].append(1),
    ]
    for k, change in enumerate(changes):
        change()
        assert state.changed() is not None, k
        assert state.changed() is None, k


def test_effects_sees_prints_clocks_and_foreign_randomness(capsys):
    import random
    import time

    with effects() as found:
        print("x")
        time.time()
        random.random()
        np.random.normal()  # noqa: NPY002
        torch.ones(2).sum()
    text = " ".join(found)
    assert all(word in text for word in ("print", "time.time", "random.random", "numpy.random"))
    assert len(found) == 4
    with effects() as found:
        torch.distributions.Normal(0.0, 1.0).sample()
        sum(range(3))
    assert not found


def test_effects_leave_a_profiler_running():
    profiler = cProfile.Profile()
    with profiler:
        with effects() as found:
            torch.ones(2).sum()
        sorted([3, 1, 2])  # the profiler still sees what comes after
    seen = {str(code) for code, *_ in profiler.getstats()}
    assert not found and any("sorted" in name for name in seen)
