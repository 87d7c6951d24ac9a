"""What a result may cost: accuracy, latency and size, as a user writes them."""

import math
import re
from dataclasses import dataclass

from onnxcomp.errors import OptionError


@dataclass(frozen=True)
class Budget:
    """Limits on a result; None for no limit.

    Attributes:
        max_drop: largest loss of the metric, in its own unit (0.01 is one point of accuracy).
        max_latency: seconds per run.
        min_speedup: ratio of the original's latency to the result's.
        max_size: bytes.
        max_size_share: of the original's bytes.
    """

    max_drop: float | None = None
    max_latency: float | None = None
    min_speedup: float | None = None
    max_size: int | None = None
    max_size_share: float | None = None

    def size_limit(self, original: int) -> int | None:
        """The limit in bytes for an original of that many bytes."""
        share = None if self.max_size_share is None else int(self.max_size_share * original)
        limits = [limit for limit in (self.max_size, share) if limit is not None]
        return min(limits, default=None)


def within(drop: float, limit: float) -> bool:
    """Whether a loss keeps its limit; 0.99 - 0.985 is half a point, although not in binary."""
    return drop <= limit or math.isclose(drop, limit)


_UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
_BYTES = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def _number(text: str, pattern: str, what: str, example: str) -> tuple[float, str]:
    match = re.fullmatch(rf"\s*(\d+(?:\.\d*)?|\.\d+)\s*({pattern})\s*", text, re.IGNORECASE)
    if match is None:
        raise OptionError(f"'{text}' is not {what}", remedy=f"write it like {example}")
    return float(match[1]), match[2]


def parse_share(text: str) -> float:
    """`1%` is 0.01, and so is `0.01`.

    Raises:
        OptionError: not a number.
    """
    number, unit = _number(text, "%?", "a share", "1% or 0.01")
    return number / 100 if unit else number


def parse_target(text: str) -> tuple[str, float]:
    """`flops=50%` is ("flops", 0.5): half of the FLOPs remain.

    Raises:
        OptionError: not a cost and a share of it.
    """
    cost, _, share = text.partition("=")
    if cost not in {"flops", "params", "size", "latency"} or not share:
        raise OptionError(
            f"'{text}' is not a target", remedy="a cost and what remains of it: flops=50%, params=70%, size=60%"
        )
    return cost, parse_share(share)


def parse_latency(text: str) -> float:
    """`5ms` in seconds.

    Raises:
        OptionError: not a time, or no unit.
    """
    number, unit = _number(text, "us|ms|s", "a latency", "5ms")
    return number * _UNITS[unit.lower()]


def parse_speedup(text: str) -> float:
    """`2x` or `2` as a ratio.

    Raises:
        OptionError: not a ratio.
    """
    return _number(text, "x?", "a speed-up", "2x")[0]


def parse_bytes(text: str) -> int:
    """`10MB` in bytes; KB is 1,000 bytes and KiB 1,024.

    Raises:
        OptionError: not a size, or no unit.
    """
    number, unit = _number(text, "|".join(_BYTES), "a size", "10MB")
    return int(number * _BYTES[unit.upper()])


def parse_size(text: str) -> Budget:
    """`25%` of the original's size, or `10MB`.

    Raises:
        OptionError: neither a share nor a size.
    """
    if text.strip().endswith("%"):
        return Budget(max_size_share=parse_share(text))
    return Budget(max_size=parse_bytes(text))
