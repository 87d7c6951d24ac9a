"""A limit on the time of a search, which then ends with the best so far."""

import time
from collections.abc import Callable
from types import TracebackType
from typing import Self


class TimeIsUp(Exception):  # noqa: N818 - nothing went wrong
    """The time is over. No OnnxcompError: what treats those as a candidate's failure lets this one through."""


class Deadline:
    """A moment after which the work inside this context stops.

    Whoever reports progress through `watching` can be stopped there.

    Args:
        seconds: from now; None for no limit.

    Attributes:
        reserve: seconds to leave for what must follow.
        passed: whether work was stopped.
    """

    def __init__(self, seconds: float | None = None) -> None:
        self._end = None if seconds is None else time.monotonic() + seconds
        self._watching = False
        self.reserve, self.passed = 0.0, False

    @property
    def limited(self) -> bool:
        """Whether there is such a moment."""
        return self._end is not None

    def watching(self, progress: Callable[[int, int, str], None]) -> Callable[[int, int, str], None]:
        """The same, which also looks at the clock.

        Raises:
            TimeIsUp: when called inside the context, after the moment.
        """

        def watched(done: int, total: int, what: str) -> None:
            if self._watching and self._end is not None and time.monotonic() > self._end - self.reserve:
                raise TimeIsUp
            progress(done, total, what)

        return watched

    def __enter__(self) -> Self:
        self._watching = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        self._watching = False
        self.passed = self.passed or isinstance(error, TimeIsUp)
        return isinstance(error, TimeIsUp)
