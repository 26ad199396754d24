"""The copy of a guide that a fit works on shares nothing with the original."""

from tests.preflight.models import GY, list_guide, parts
from vi_toolkit.programs.private_guide import private_guide


def test_a_private_guide_leaves_the_original_untouched():
    guide = list_guide()
    twin = private_guide(parts, guide)
    twin(**GY)
    assert guide.prototype_trace is None
    assert [part.model is not None for part in guide] == [True] * 3
    assert all(part.master() is guide for part in guide)
    assert all(part.master() is twin for part in twin)
