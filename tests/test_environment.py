"""pyproject.toml, constraints.txt and environment.yml name the same set of packages."""

import importlib.metadata
import re
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
CONDA_NAME = {"torch": "pytorch", "matplotlib": "matplotlib-base"}  # where conda-forge differs


def requirements() -> dict[str, Requirement]:
    """What pyproject.toml asks for to run and to test, by canonical name."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = project["dependencies"] + project["optional-dependencies"]["test"]
    parsed = [Requirement(line) for line in lines]
    assert len({canonicalize_name(item.name) for item in parsed}) == len(parsed), "named twice"
    return {canonicalize_name(item.name): item for item in parsed}


def pins() -> dict[str, Version]:
    """What constraints.txt pins, by canonical name; every line must be ``name==version``."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    parsed = [line.split("==") for line in lines if not line.startswith("#")]
    return {canonicalize_name(name): Version(version) for name, version in parsed}


def installed_closure() -> dict[str, Version]:
    """Everything that :func:`requirements` pulls in here, with its installed public version."""
    closure: dict[str, Version] = {}
    queue = list(requirements().values())
    seen: set[str] = set()
    while queue:
        item = queue.pop()
        if str(item) in seen:
            continue
        seen.add(str(item))
        found = importlib.metadata.distribution(item.name)
        # 2.13.0+cpu is 2.13.0: the local part says where the build came from
        closure[canonicalize_name(item.name)] = Version(Version(found.version).public)
        for line in found.requires or []:
            child = Requirement(line)
            extras = {"", *item.extras}
            if child.marker is None or any(child.marker.evaluate({"extra": e}) for e in extras):
                queue.append(child)
    return closure


def test_every_requirement_is_pinned_inside_its_range():
    pinned = pins()
    for name, requirement in requirements().items():
        assert name in pinned, f"constraints.txt does not pin {name}"
        assert requirement.specifier, f"pyproject.toml gives no range for {name}"
        assert requirement.specifier.contains(pinned[name]), (
            f"{requirement} excludes {pinned[name]}"
        )


def test_conda_environment_is_the_same_set():
    lines = (ROOT / "environment.yml").read_text().split("dependencies:\n")[1].splitlines()
    conda = {
        re.match(r"[\w.-]+", item).group(): re.sub(r"^[\w.-]+", "", item)
        for line in lines
        if (item := line.strip().removeprefix("- ")) and not item.startswith(("#", "-e", "pip:"))
    }
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    expected = {
        CONDA_NAME.get(name, name): requirement.specifier
        for name, requirement in requirements().items()
    }
    assert conda.pop("python") == project["requires-python"]
    conda.pop("pip")
    assert {name: set(spec.split(",")) for name, spec in conda.items()} == {
        name: {str(part) for part in spec} for name, spec in expected.items()
    }


def test_makefile_installs_the_pinned_torch():
    makefile = (ROOT / "Makefile").read_text()
    assert re.findall(r"torch==([\w.]+)", makefile) == [str(pins()["torch"])]


@pytest.mark.skipif(
    Path(sys.prefix) != ROOT / ".venv"
    or sys.platform != "linux"
    or sys.version_info[:2] != (3, 11),
    reason="only the .venv that make builds on Linux with Python 3.11 must agree to the letter",
)
def test_constraints_are_exactly_what_is_installed():
    assert pins() == installed_closure()
