"""What a result may cost: accuracy, latency, size and memory, as a user writes them; and what keeps which limit."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

from onnxcomp.errors import OptionError


class Measured(Protocol):
    """What a model was found to cost; None where that was not measured."""

    @property
    def size(self) -> int:
        """Bytes of the file."""

    @property
    def memory(self) -> int | None:
        """Bytes by which a process grows that loads and runs it."""

    @property
    def latency(self) -> float | None:
        """Seconds per run."""

    @property
    def speedup(self) -> float | None:
        """The original's latency over this one's."""

    @property
    def drop(self) -> float | None:
        """Loss of the metric."""


@dataclass(frozen=True)
class Check:
    """One limit and what was measured against it.

    Attributes:
        limit: its option: `max-drop`, `min-speedup`, `max-latency`, `max-size` or `max-memory`.
        bound: what it is; of sizes and memory in bytes.
        value: what was measured, in the same unit; NaN where nothing was.
        passed: whether it holds.
    """

    limit: str
    bound: float
    value: float
    passed: bool


@dataclass(frozen=True)
class Budget:
    """Limits on a result; None for no limit.

    Attributes:
        max_drop: largest loss of the metric, in its own unit (0.01 is one point of accuracy).
        max_latency: seconds per run.
        min_speedup: ratio of the original's latency to the result's.
        max_size: bytes.
        max_size_share: of the original's bytes.
        max_memory: bytes by which a process may grow that loads and runs the result.
        max_memory_share: of what it grows by with the original.
    """

    max_drop: float | None = None
    max_latency: float | None = None
    min_speedup: float | None = None
    max_size: int | None = None
    max_size_share: float | None = None
    max_memory: int | None = None
    max_memory_share: float | None = None

    def size_limit(self, original: int) -> int | None:
        """The limit in bytes for an original of that many bytes."""
        return _tighter(self.max_size, self.max_size_share, original)

    def memory_limit(self, original: int) -> int | None:
        """The limit in bytes for an original that takes that many."""
        return _tighter(self.max_memory, self.max_memory_share, original)

    @property
    def limits_time(self) -> bool:
        """Whether a run has a limit."""
        return self.max_latency is not None or self.min_speedup is not None

    @property
    def limits_size(self) -> bool:
        """Whether bytes of the file count."""
        return self.max_size is not None or self.max_size_share is not None

    @property
    def limits_memory(self) -> bool:
        """Whether memory must be measured."""
        return self.max_memory is not None or self.max_memory_share is not None

    def checks(self, original: Measured, result: Measured) -> Iterator[Check]:
        """Every limit, and whether it holds; none does where nothing was measured."""
        values = (result.drop, result.latency, result.speedup, result.memory)
        drop, latency, speedup, memory = (math.nan if value is None else value for value in values)
        if self.max_drop is not None:
            yield Check("max-drop", self.max_drop, drop, within(drop, self.max_drop))
        if self.max_latency is not None:
            yield Check("max-latency", self.max_latency, latency, latency <= self.max_latency)
        if self.min_speedup is not None:
            yield Check("min-speedup", self.min_speedup, speedup, speedup >= self.min_speedup)
        if (size := self.size_limit(original.size)) is not None:
            yield Check("max-size", size, result.size, result.size <= size)
        if (most := self.memory_limit(original.memory or 0)) is not None:
            yield Check("max-memory", most, memory, memory <= most)


def _tighter(limit: int | None, share: float | None, original: int) -> int | None:
    limits = [limit, None if share is None else int(share * original)]
    return min((limit for limit in limits if limit is not None), default=None)


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


def parse_duration(text: str) -> float:
    """`90s`, `3min` or `2h` in seconds.

    Raises:
        OptionError: not a time, or no unit.
    """
    number, unit = _number(text, "s|min|h", "a time", "90s or 3min")
    return number * {"s": 1.0, "min": 60.0, "h": 3600.0}[unit.lower()]


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


def parse_size(text: str, of: Literal["size", "memory"] = "size") -> Budget:
    """`25%` of the original's size or memory, or `10MB`.

    Raises:
        OptionError: neither a share nor a size.
    """
    if text.strip().endswith("%"):
        share = parse_share(text)
        return Budget(max_size_share=share) if of == "size" else Budget(max_memory_share=share)
    most = parse_bytes(text)
    return Budget(max_size=most) if of == "size" else Budget(max_memory=most)
