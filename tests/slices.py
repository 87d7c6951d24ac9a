"""The suite is whole with `-m slow`; by itself it takes a slice of what has many cases that each take seconds."""

from collections.abc import Iterable
from typing import Any

import pytest


def sliced(cases: Iterable[Any], step: int) -> list[Any]:
    """Cases for `parametrize`: every step-th as it is, the others marked slow."""
    return [
        pytest.param(*(case if isinstance(case, tuple) else [case]), marks=pytest.mark.slow if index % step else ())
        for index, case in enumerate(cases)
    ]
