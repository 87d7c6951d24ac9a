"""On how many threads BLAS works.

It splits a product differently for another number of threads, and its last digits differ then: between machines, and
between one process that has all cores and several that share them. And its threads go on spinning for a while after
each product, which takes a core from whatever comes next.
"""

import contextlib
import functools
import threading
from collections.abc import Iterator
from typing import Any

import scipy.linalg  # noqa: F401  (brings a BLAS of its own, which must be there when they are looked for)
from threadpoolctl import ThreadpoolController

_WIDE = 1536
"""Below it, matrices take less time on one thread than others lose by the spinning of those that helped."""

_lock = threading.Lock()
_inside: list[Any] = []
_found = functools.cache(ThreadpoolController)
"""Looks for the libraries once, which takes longer than a small product."""


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """BLAS works on one thread inside.

    OpenBLAS takes a limit that a thread sets for that thread's alone or for the whole process's, by how it was built.
    So each thread sets it, and what was before comes back when the last one leaves.
    """
    with _lock:
        _inside.append(_found().limit(limits=1))
    try:
        yield
    finally:
        with _lock:
            first = _inside[0]
            _inside.pop()
            if not _inside:
                first.restore_original_limits()


def as_pays(width: int) -> contextlib.AbstractContextManager[None]:
    """BLAS works on one thread inside, unless square matrices of that width are worth more."""
    return contextlib.nullcontext() if width >= _WIDE else one_thread()
