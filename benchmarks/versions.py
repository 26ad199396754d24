"""Which versions of PyTorch and of ArviZ does the toolkit work with?

Installs one version after the other, each into a temporary folder that Python searches before the
environment's own packages, runs the tests that depend on it, and removes the folder. Prints a
table, and below it the first line of each failure. The usual builds of PyTorch bring several GB of
CUDA libraries; at most one set is on the disk at any time.

Example::

    python -m benchmarks.versions torch
    python -m benchmarks.versions torch --versions 2.13 newest --tests tests/compiled
    python -m benchmarks.versions arviz

``newest`` stands for the newest release that pip finds.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
VERSIONS = {
    "torch": ("2.8", "2.10", "2.12", "2.13", "newest"),
    "arviz": ("0.18", "0.21", "0.23", "1.0", "1.2", "newest"),
}
TESTS = {
    "torch": (
        "tests/compiled",
        "tests/deterministic",
        "tests/estimators",
        "tests/stochastic",
        "tests/test_fitting.py",
    ),
    "arviz": (
        "tests/diagnostics",
        "tests/reference",
        "tests/test_arviz_adapter.py",
        "tests/test_export.py",
    ),
}
COLUMNS = "| {:>9} | {:>6} | {:>6} | {:>7} | {:>7} |"


@dataclass
class Outcome:
    """What the tests did with one version: counts, seconds, and failures (message -> tests)."""

    version: str
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    seconds: float = 0.0
    failures: dict[str, list[str]] = field(default_factory=dict)

    @property
    def row(self) -> str:
        return COLUMNS.format(
            self.version, self.passed, self.failed, self.skipped, f"{self.seconds:.0f}"
        )


def requirements(package: str, version: str) -> list[str]:
    """Arguments of ``pip install`` for a version, given as its first numbers or "newest"."""
    exact = "" if version == "newest" else f"=={version}.*"
    if package == "torch":
        return [f"torch{exact}"]
    names = ["arviz"]
    if not exact or version.split(".")[0] != "0":
        names += ["arviz-base", "arviz-stats", "arviz-plots"]
    # ArviZ 1.x asks for Python 3.12 but runs on 3.11; several versions need an older matplotlib.
    others = ["dm-tree", "lazy-loader", "matplotlib<3.11"]
    return ["--no-deps", "--ignore-requires-python", *(name + exact for name in names), *others]


def run(package: str, version: str, tests: list[str], workers: int) -> Outcome:
    """Install a version, run the tests with it, and remove it."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        report, packages = folder / "report.xml", folder / "packages"
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-input"]
        install += ["--no-cache-dir", "--disable-pip-version-check", "--target", str(packages)]
        done = subprocess.run(
            [*install, *requirements(package, version)], capture_output=True, text=True
        )
        if done.returncode:
            return Outcome(version, failures={f"not installed: {last_line(done.stderr)}": []})
        (found,) = importlib.metadata.distributions(name=package, path=[str(packages)])
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join((str(packages), str(ROOT))),
            "TORCHINDUCTOR_CACHE_DIR": str(folder / "cache"),
        }
        pytest = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-n",
            str(workers),
            "-p",
            "no:cacheprovider",
        ]
        done = subprocess.run(
            [*pytest, f"--junitxml={report}", *tests],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env=environment,
        )
        outcome = Outcome(found.version, seconds=time.perf_counter() - start)
        if report.exists():
            count(ElementTree.parse(report).getroot(), outcome)
        if done.returncode and not outcome.failures:
            outcome.failures[f"pytest stopped: {last_line(done.stdout + done.stderr)}"] = []
    return outcome


def count(report: ElementTree.Element, outcome: Outcome) -> None:
    """Add the test cases of pytest's JUnit report to an outcome."""
    for case in report.iter("testcase"):
        bad = [node for kind in ("failure", "error") for node in case.findall(kind)]
        if bad:
            message = bad[0].get("message", "").strip().partition("\n")[0][:150]
            test = f"{case.get('classname')}.{case.get('name')}"
            outcome.failures.setdefault(message, []).append(test)
            outcome.failed += 1
        elif case.find("skipped") is not None:
            outcome.skipped += 1
        else:
            outcome.passed += 1


def last_line(text: str) -> str:
    return (text.strip().splitlines() or ["nothing was printed"])[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("package", choices=sorted(VERSIONS))
    parser.add_argument("--versions", nargs="+", help="such as 2.13 or newest")
    parser.add_argument("--tests", nargs="+", help="arguments of pytest")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    versions = options.versions or VERSIONS[options.package]
    tests = options.tests or list(TESTS[options.package])
    print(COLUMNS.format(options.package, "passed", "failed", "skipped", "seconds"))
    print(COLUMNS.format(*("---:",) * 5), flush=True)
    outcomes = []
    for version in versions:
        outcomes.append(run(options.package, version, tests, options.workers))
        print(outcomes[-1].row, flush=True)
    for outcome in outcomes:
        if outcome.failures:
            print(f"\n{options.package} {outcome.version}")
            for message, failing in outcome.failures.items():
                print(f"- {message}", *failing, sep="\n    ")
    sys.exit(any(outcome.failures for outcome in outcomes))


if __name__ == "__main__":
    main()
