"""A mistake, and the check of what preflight says about it."""

import re
from typing import Any, NamedTuple

import pytest

from vi_toolkit.errors import PreflightError
from vi_toolkit.preflight import preflight


class Case(NamedTuple):
    """A mistake, and what the message must say."""

    model: Any
    guide: Any
    data: Any
    says: tuple[str, ...]
    site: str | None
    options: dict[str, Any] = {}  # noqa: RUF012


def check_message(case):
    with pytest.raises(PreflightError) as caught:
        preflight(case.model, case.guide, case.data, **case.options)
    message = str(caught.value)
    print(message)  # pytest -rP tests/preflight shows them all
    for part in case.says:
        assert part in message
    assert caught.value.site == case.site
    assert caught.value.remedy
    assert message.endswith(caught.value.remedy)
    assert "\n" not in message
    assert re.search(r"[.?!]$", message)
