from collections.abc import Callable

import pytest

from onnxcomp.budget import Budget, parse_bytes, parse_latency, parse_share, parse_size, parse_speedup, within
from onnxcomp.errors import OptionError


@pytest.mark.parametrize(
    ("parse", "text", "value"),
    [
        (parse_share, "1%", 0.01),
        (parse_share, "0.01", 0.01),
        (parse_share, " .5 % ", 0.005),
        (parse_share, "0", 0.0),
        (parse_latency, "5ms", 0.005),
        (parse_latency, "250 us", 0.00025),
        (parse_latency, "1.5S", 1.5),
        (parse_speedup, "2x", 2.0),
        (parse_speedup, "1.25", 1.25),
        (parse_bytes, "10MB", 10**7),
        (parse_bytes, "1.5 KiB", 1536),
        (parse_bytes, "700b", 700),
        (parse_size, "25%", Budget(max_size_share=0.25)),
        (parse_size, "2GB", Budget(max_size=2 * 10**9)),
    ],
)
def test_what_users_write(parse: Callable[[str], object], text: str, value: object) -> None:
    assert parse(text) == pytest.approx(value) if isinstance(value, float) else parse(text) == value


@pytest.mark.parametrize(
    ("parse", "text", "message"),
    [
        (parse_share, "-1%", "'-1%' is not a share"),
        (parse_share, "one", "write it like 1% or 0.01"),
        (parse_share, "nan", "is not a share"),
        (parse_latency, "5", "is not a latency"),
        (parse_latency, "5 min", "write it like 5ms"),
        (parse_speedup, "fast", "is not a speed-up"),
        (parse_bytes, "10", "write it like 10MB"),
        (parse_size, "", "is not a size"),
        (parse_size, "%", "is not a share"),
    ],
)
def test_what_is_no_number_or_lacks_its_unit(parse: Callable[[str], object], text: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        parse(text)


def test_the_tighter_limit_on_size_counts() -> None:
    assert Budget().size_limit(1000) is None
    assert Budget(max_size_share=0.25).size_limit(1000) == 250
    assert Budget(max_size=300).size_limit(1000) == 300
    assert Budget(max_size=300, max_size_share=0.25).size_limit(1000) == 250
    assert Budget(max_size=0).size_limit(1000) == 0


def test_the_limit_itself_is_within() -> None:
    assert within(0.99 - 0.985, 0.005)
    assert within(0.0, 0.0)
    assert within(-1.0, 0.0)
    assert not within(0.00501, 0.005)
    assert not within(float("nan"), 0.005)
    assert not within(float("inf"), 0.005)
