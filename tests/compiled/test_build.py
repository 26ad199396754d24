"""The shared library of a graph: made quickly, or else as inductor makes it."""

import subprocess

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal

import vi_toolkit as vi
from vi_toolkit.compiled import aot_cache, build


def model(y):
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    pyro.sample("y", dist.Normal(pyro.sample("mean", dist.Normal(0.0, 3.0)), scale), obs=y)


def fitted(compile):
    data = {"y": torch.tensor(2.0)}
    return vi.fit(
        model, AutoNormal, data, optimizer=0.02, steps=60, compile=compile, progress=False
    )


@pytest.fixture
def built(monkeypatch, tmp_path):
    """Compiles everything anew; yields the commands that this takes."""
    commands = []
    start = subprocess.Popen.__init__

    def noting(self, args, *rest, **options):
        commands.append(list(args))
        start(self, args, *rest, **options)

    monkeypatch.setattr(subprocess.Popen, "__init__", noting)
    monkeypatch.setattr(aot_cache, "FORMAT", str(tmp_path))
    return commands


def assert_as_eager(fit):
    for name, value in fitted(False).params.items():
        torch.testing.assert_close(fit.params[name], value, rtol=1e-4, atol=1e-5)


def sources(commands):
    return [a for c in commands for a in c if a.endswith((".cpp", ".hpp"))]


def test_the_compiler_is_given_one_file_which_allocates_before_its_loop(built, monkeypatch):
    from torch._inductor import cpu_vec_isa

    tested = cpu_vec_isa.valid_vec_isa_list
    texts = []

    def noting(source):
        texts.append((source, allocate_once(source)))
        return texts[-1][1]

    allocate_once = build.allocate_once
    monkeypatch.setattr(build, "allocate_once", noting)
    assert_as_eager(fitted(True))
    assert len(sources(built)) == len(texts) <= 2  # the loop, and what leaves it
    assert cpu_vec_isa.valid_vec_isa_list is tested
    (source, changed), *_ = (pair for pair in texts if "while (1)" in pair[0])

    def in_loop(text):
        return text.split("    while (1) {\n")[1].split("\n    }\n")[0].count("empty_strided")

    assert in_loop(source) > 10 and in_loop(changed) == 1  # of the condition


@pytest.mark.parametrize(
    ("text", "replacement"),
    [
        ("#include <memory>", "#include <no/such/header.h>"),  # the compiler fails
        ("AOTInductorModelContainerGetNumOutputs", "AnotherName"),  # torch does not load it
    ],
)
def test_where_that_fails_inductor_makes_the_library(built, monkeypatch, text, replacement):
    entry = build.entry()
    assert text in entry
    monkeypatch.setattr(build, "entry", lambda: entry.replace(text, replacement))
    assert_as_eager(fitted(True))
    assert any(name.endswith(".kernel.cpp") for name in sources(built))


def test_a_setting_that_inductor_needs_and_does_not_have_leaves_the_build_to_it(built, monkeypatch):
    monkeypatch.setattr(build, "_ONLY_CPP", {"aot_inductor.no_such_setting": True})
    assert_as_eager(fitted(True))
    assert any(name.endswith(".kernel.cpp") for name in sources(built))


def test_a_setting_for_speed_that_inductor_does_not_have_is_left_out(built, monkeypatch):
    monkeypatch.setitem(build._FASTER, "no_such_setting", 1)
    monkeypatch.setitem(build._NO_DEBUGGER, "aot_inductor.no_such_setting", False)
    assert_as_eager(fitted(True))
    assert not any(name.endswith(".kernel.cpp") for name in sources(built))


@pytest.mark.parametrize(
    ("there", "found"),
    [
        (["step.so"], "step.so"),
        (["operators.so", "operators.json"], "operators.so"),
        (["operators.so"], None),
        (["operators.json"], None),
        ([], None),
    ],
)
def test_a_folder_that_has_lost_a_file_has_no_library(tmp_path, there, found):
    for name in there:
        (tmp_path / name).touch()
    assert build.find(tmp_path) == (found and tmp_path / found)


def test_a_library_that_has_lost_a_file_is_made_again(monkeypatch, tmp_path):
    """Some operators need a description beside the library: draws from a Gamma distribution."""

    def guide(y):
        a = pyro.param("a", torch.tensor(2.0), constraint=dist.constraints.positive)
        pyro.sample("rate", dist.Gamma(a, 1.0))

    def counts(y):
        pyro.sample("y", dist.Poisson(pyro.sample("rate", dist.Gamma(1.0, 1.0))), obs=y)

    def once():
        monkeypatch.setattr(aot_cache, "_loaded", type(aot_cache._loaded)())
        options = {"optimizer": 0.02, "steps": 30, "compile": True, "progress": False}
        return vi.fit(counts, guide, {"y": torch.tensor(3.0)}, **options).elbo

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    elbo = once()
    for lost in ("json", "so"):
        (file,) = (tmp_path / "vi_toolkit").glob(f"*/operators.{lost}")
        file.unlink()
        assert (once() == elbo).all() and file.exists()
    assert len(list((tmp_path / "vi_toolkit").iterdir())) == 1


def test_cpp_of_another_form_is_left_to_inductor():
    with pytest.raises(ValueError, match="another form"):
        build.without_its_container('\n} // extern "C"\nint main() {}', 1)


def test_inductors_list_of_vector_instructions_is_restored_after_an_error():
    from torch._inductor import cpu_vec_isa

    tested = cpu_vec_isa.valid_vec_isa_list
    with pytest.raises(KeyError), build.trusting_the_processor():
        raise KeyError
    assert cpu_vec_isa.valid_vec_isa_list is tested
