"""Matrix products that do not depend on how many threads do them.

BLAS splits a product differently for another number of threads, and its last digits differ then: between machines, and
between one process that has all cores and several that share them.
"""

import contextlib
import threading
from collections.abc import Iterator

from threadpoolctl import threadpool_limits

_lock = threading.Lock()
_inside: list[threadpool_limits] = []


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """BLAS works on one thread while any thread of this process is inside: its own limit is one of the process."""
    with _lock:
        _inside.append(_inside[0] if _inside else threadpool_limits(1))  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        with _lock:
            limit = _inside.pop()
            if not _inside:
                limit.restore_original_limits()  # type: ignore[no-untyped-call]
