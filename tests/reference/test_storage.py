"""References come back from their files bit for bit, and damaged files are refused."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from tests.reference.models import COVARIANCE
from vi_toolkit.errors import LoadError
from vi_toolkit.reference import Reference

RECIPES = Path(__file__).parents[2] / "recipes"


def assert_same(a, b):
    for field in dataclasses.fields(Reference):
        left, right = getattr(a, field.name), getattr(b, field.name)
        if isinstance(left, np.ndarray):
            assert left.dtype == right.dtype == np.float64
            assert left.tobytes() == right.tobytes(), field.name
        elif isinstance(left, dict) and field.name != "made":
            assert left.keys() == right.keys()
            assert all(left[k].tobytes() == right[k].tobytes() for k in left), field.name
        else:
            assert left == right, field.name


def test_round_trip_bit_for_bit(nuts, tmp_path):
    awkward = Reference.exact(
        ["a", "b"],
        [1 / 3, -1e300],
        np.diag([np.nextafter(1.0, 2.0), 5e-324 + 1e-200]),
        skewness=[0.1, 0.2],
        log_evidence=-np.pi,
    )
    unknown = dataclasses.replace(awkward, covariance=None, log_evidence=None)
    for number, r in enumerate((nuts, awkward, unknown)):
        path = tmp_path / f"{number}.json"
        r.save(path)
        back = Reference.load(path)
        assert_same(r, back)
        back.save(tmp_path / "again.json")
        assert path.read_bytes() == (tmp_path / "again.json").read_bytes()


@pytest.mark.parametrize("name", sorted(p.parent.name for p in RECIPES.glob("*/reference.json")))
def test_saving_a_recipes_reference_reproduces_its_file(name, tmp_path):
    path = RECIPES / name / "reference.json"
    Reference.load(path).save(tmp_path / "again.json")
    assert path.read_bytes() == (tmp_path / "again.json").read_bytes()


def test_version_1_is_read(nuts, tmp_path):
    """It called the standard errors mcse_mean, mcse_sd, mcse_conditional_sd and mcse_quantiles."""
    path = tmp_path / "reference.json"
    nuts.save(path)
    text = path.read_text().replace('"format_version": 2', '"format_version": 1')
    for name in ("mean", "sd", "conditional_sd", "quantiles"):
        text = text.replace(f'"{name}_se"', f'"mcse_{name}"')
    path.write_text(text)
    assert_same(nuts, Reference.load(path))


def test_the_file_can_be_read_by_people(nuts, tmp_path):
    path = tmp_path / "reference.json"
    nuts.save(path)
    lines = path.read_text().splitlines()
    assert max(map(len, lines)) < 250
    assert any(line.startswith(' "mean": [') for line in lines)  # one line per quantity
    content = json.loads(path.read_text())
    assert list(content) == sorted(content)
    assert all(len(repr(x)) < 20 for x in content["mean"] + content["sd_se"])
    assert "date" not in path.read_text()


def test_a_truncated_file(nuts, tmp_path):
    path = tmp_path / "reference.json"
    nuts.save(path)
    whole = path.read_bytes()
    for length in (0, 1, len(whole) // 2, len(whole) - 3):
        path.write_bytes(whole[:length])
        with pytest.raises(LoadError, match="cut short"):
            Reference.load(path)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"\x80\x81\xfe\xff binary", "not JSON"),
        (b"[1, 2, 3]", "not a reference"),
        (b'{"draws": [1, 2]}', "not a reference"),
    ],
)
def test_a_foreign_file(tmp_path, content, complaint):
    path = tmp_path / "reference.json"
    path.write_bytes(content)
    with pytest.raises(LoadError, match=complaint):
        Reference.load(path)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"format_version": 99}, "version 99"),
        ({"mean": [1.0, 2.0]}, "mean must have shape"),
        ({"mean": "none"}, "not a valid"),
        ({"sd": [1.0, float("nan"), 2.0]}, "not a finite number"),
        ({"quantiles": [1, 2]}, "not a valid"),
        ({"kind": "rumour"}, "kind"),
        ({"covariance": None, "names": None}, "not a valid"),
    ],
)
def test_a_corrupt_file(tmp_path, change, complaint):
    path = tmp_path / "reference.json"
    Reference.exact(["a", "b", "c"], np.zeros(3), COVARIANCE).save(path)
    content = json.loads(path.read_text()) | change
    path.write_text(json.dumps(content))
    with pytest.raises(LoadError, match=complaint):
        Reference.load(path)


def test_a_missing_field_and_a_missing_file(tmp_path):
    path = tmp_path / "reference.json"
    Reference.exact(["a", "b", "c"], np.zeros(3), COVARIANCE).save(path)
    content = json.loads(path.read_text())
    del content["sd_se"]
    path.write_text(json.dumps(content))
    with pytest.raises(LoadError, match="lacks sd_se"):
        Reference.load(path)
    with pytest.raises(FileNotFoundError):
        Reference.load(tmp_path / "nowhere.json")
