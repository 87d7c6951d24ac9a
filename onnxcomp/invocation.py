"""The command line that asks `optimize` for the same again."""

import os
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxcomp.budget import Budget
from onnxcomp.images import ImageOptions
from onnxcomp.runtime import Target


@dataclass(frozen=True)
class Invocation:
    """What `optimize` was given, as it documents it."""

    source: Any
    output: Any
    calib: Any
    evaluation: Any
    metric: str | Callable[[Any], float] | None
    budget: Budget
    passes: Sequence[str] | None
    exclude: str | None
    target: Target
    batch: int
    effort: str
    seed: int
    memory: int
    images: ImageOptions | None
    best_effort: bool
    keep_overridable: bool
    time_limit: float | None
    executor: str | None

    def __str__(self) -> str:
        """The command, for a POSIX shell. What came as an object of Python stands as `<its type>`."""
        words = ["onnxcomp", "optimize", _given(self.source) or ""]
        for option, value in self._options():
            words += [] if value is None else [option, value] if value else [option]
        return shlex.join(words)

    def _options(self) -> Iterator[tuple[str, str | None]]:
        """None for what is as usual; an option without a value has an empty one."""
        limits, images = self.budget, self.images or ImageOptions()
        yield "--calib", _given(self.calib)
        yield "--eval", _given(self.evaluation)
        yield "--metric", _given(self.metric)
        yield "--max-drop", _number(limits.max_drop)
        yield "--max-latency", _number(limits.max_latency, "s")
        yield "--min-speedup", _number(limits.min_speedup, "x")
        yield "--max-size", _number(limits.max_size, "B")
        yield "--max-size", _number(None if limits.max_size_share is None else 100 * limits.max_size_share, "%")
        yield "--max-memory", _number(limits.max_memory, "B")
        yield "--max-memory", _number(None if limits.max_memory_share is None else 100 * limits.max_memory_share, "%")
        yield "--passes", None if self.passes is None else ",".join(self.passes)
        yield "--exclude", self.exclude
        yield "--provider", _unless("cpu", self.target.provider)
        yield "--threads", _unless("0", str(self.target.threads))
        yield "--batch", _unless("1", str(self.batch))
        yield "--effort", _unless("default", str(self.effort))
        yield "--time-limit", _number(self.time_limit, "s")
        yield "--seed", _unless("0", str(self.seed))
        yield "--memory", _unless("2000000000B", f"{self.memory}B")
        yield "--executor", None if self.executor is None else _unless("local", self.executor)
        yield "--image-size", None if images.size is None else "{}x{}".format(*images.size)
        yield "--mean", None if images.mean == ImageOptions.mean else ",".join(map(repr, images.mean))
        yield "--std", None if images.std == ImageOptions.std else ",".join(map(repr, images.std))
        yield "--layout", images.layout
        yield "--keep-overridable", "" if self.keep_overridable else None
        yield "--best-effort", "" if self.best_effort else None
        yield "-o", _given(self.output)


def _given(value: object) -> str | None:
    if value is None or isinstance(value, str):
        return value
    return os.fspath(value) if isinstance(value, os.PathLike) else f"<{type(value).__name__}>"


def _unless(usual: str, value: str) -> str | None:
    return None if value == usual else value


def _number(value: float | None, unit: str = "") -> str | None:
    return None if value is None else np.format_float_positional(value, trim="-") + unit
