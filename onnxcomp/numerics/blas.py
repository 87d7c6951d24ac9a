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
    """BLAS works on one thread inside.

    OpenBLAS takes a limit that a thread sets for that thread's alone or for the whole process's, by how it was built.
    So each thread sets it, and what was before comes back when the last one leaves.
    """
    with _lock:
        _inside.append(threadpool_limits(1))  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        with _lock:
            first = _inside[0]
            _inside.pop()
            if not _inside:
                first.restore_original_limits()  # type: ignore[no-untyped-call]
