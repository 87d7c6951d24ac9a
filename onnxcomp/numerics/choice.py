"""One option for each part, with the least of one sum that limits on others allow.

Where each part's costs are its own, that is a multiple-choice knapsack. Where a cost depends on the options of several
parts together (a layer's time on the widths on both its sides and on its precision), there is a variable for each
combination, whose sums over all other parts are the parts' own (the local marginal polytope; Wainwright and Jordan
2008, section 4.1.1). Costs that are paid once if any of several parts differs need one variable each.
"""

import contextlib
import ctypes
import os
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array, csr_array

from onnxcomp.numerics.arrays import Floats

_GAP = 1e-4
_SECONDS = 10.0
_LEAST_LIMIT = 1e-9
"""Share of a sum's largest cost at which a limit counts as none at all: rows are scaled by their limits."""

_one_at_a_time = threading.Lock()


@dataclass(frozen=True, eq=False)
class Term:
    """A cost that depends on the options of several parts together.

    Attributes:
        parts: their numbers, each once.
        costs: (options of the first, options of the second, ..., sums).
    """

    parts: tuple[int, ...]
    costs: Floats


@dataclass(frozen=True, eq=False)
class Clash:
    """A cost that is paid once, if a part takes one of some options and any of several others one of theirs.

    Attributes:
        first: number of the part, and (options,) whether each counts.
        others: the same of the others.
        costs: (sums,), not negative.
    """

    first: tuple[int, NDArray[np.bool_]]
    others: tuple[tuple[int, NDArray[np.bool_]], ...]
    costs: Floats


def choose(errors: Sequence[Floats], costs: Sequence[Floats], limits: Floats) -> list[int] | None:
    """The options to take where each part's costs are its own.

    Args:
        errors: of each part (options,).
        costs: of each part (options, limits).
        limits: (limits,) of the sums of costs.

    Returns:
        For each part the number of its option, within 1e-4 of the least error; None where no choice keeps the limits.
    """
    kept = [undominated(*part) for part in zip(errors, costs, strict=True)]
    tables = [np.column_stack(part) for part in zip(errors, costs, strict=True)]
    terms = [Term((part,), tables[part][numbers]) for part, numbers in enumerate(kept)]
    found = choose_together([len(numbers) for numbers in kept], terms, (), limits)
    return found and [int(numbers[number]) for numbers, number in zip(kept, found, strict=True)]


def choose_together(
    options: Sequence[int],
    terms: Sequence[Term],
    clashes: Sequence[Clash],
    limits: Floats,
    *,
    apart: Iterable[tuple[int, int]] = (),
) -> list[int] | None:
    """The options to take, by branch and bound (HiGHS; Huangfu and Hall 2018).

    Args:
        options: of each part, how many.
        terms: what is added up. The first sum is to be least, the others have limits.
        clashes: what is added to them.
        limits: (sums - 1,) infinite for none.
        apart: two parts each, one of which takes its first option.

    Returns:
        For each part the number of its option, within 1e-4 of the least sum; None where no choice keeps the limits.
    """
    bounds = np.asarray(limits, np.float64)
    if not options:
        return [] if np.all(bounds >= 0) else None
    problem = _Problem(options, len(bounds) + 1)
    for term in terms:
        problem.add(term)
    for clash in clashes:
        problem.clash(clash)
    for pair in apart:
        problem.separate(*pair)
    objective, *rows = problem.costs()
    whole = np.zeros(problem.size, np.int64)
    whole[: problem.starts[-1]] = 1
    largest = np.array([np.abs(row).max(initial=1.0) for row in rows])
    scale = np.maximum(np.abs(bounds), _LEAST_LIMIT * largest)
    limited = np.flatnonzero(np.isfinite(bounds))
    constraints = [*problem.constraints()]
    if len(limited):
        shares = csr_array(np.stack([rows[number] / scale[number] for number in limited]))
        constraints.append(LinearConstraint(shares, -np.inf, bounds[limited] / scale[limited]))
    with _silence():
        found = milp(
            objective / (np.abs(objective).max() or 1.0),
            integrality=whole,
            bounds=Bounds(0, np.where(whole, 1, np.inf)),
            constraints=constraints,
            options={"mip_rel_gap": _GAP, "time_limit": _SECONDS},
        )
    if found.x is None:
        return None
    return [int(np.argmax(found.x[start:stop])) for start, stop in pairwise(problem.starts)]


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Nothing that C code prints reaches stdout, where results go.

    HiGHS 1.12 prints a line that no option turns off (its issue 2783). One thread at a time: another would take what
    this one put in the place of stdout for stdout.
    """
    with _one_at_a_time:
        try:
            kept = os.dup(1)
        except OSError:  # there is no stdout
            yield
            return
        with contextlib.suppress(AttributeError, ValueError):  # Python has none, or closed it
            sys.stdout.flush()
        with Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), 1)
        try:
            yield
        finally:
            with contextlib.suppress(OSError, TypeError, AttributeError):  # no C library by that name
                ctypes.CDLL(None).fflush(None)
            os.dup2(kept, 1)
            os.close(kept)


class _Problem:
    """Rows and columns of the program: the parts' options first, then what stands for combinations and clashes.

    Args:
        options: of each part.
        sums: how many.
    """

    def __init__(self, options: Sequence[int], sums: int) -> None:
        self.starts = np.cumsum([0, *options])
        self.size = int(self.starts[-1])
        self._sums = sums
        self._costs: list[tuple[NDArray[np.int64], Floats]] = []  # columns, and (columns, sums)
        self._equal: list[tuple[list[int], list[float], float]] = [
            (list(range(start, stop)), [1.0] * (stop - start), 1.0) for start, stop in pairwise(self.starts.tolist())
        ]
        self._below: list[tuple[list[int], list[float], float]] = []

    def add(self, term: Term) -> None:
        """A term; parts on which it does not depend are left out of it."""
        costs = np.asarray(term.costs, np.float64)
        parts = list(term.parts)
        for axis in reversed(range(len(parts))):
            first = costs.take([0], axis=axis)
            if len(parts) > 1 and np.all(costs == first):
                costs = first.squeeze(axis)
                del parts[axis]
        flat = costs.reshape(-1, self._sums)
        if len(parts) == 1:
            self._costs.append((np.arange(self.starts[parts[0]], self.starts[parts[0] + 1]), flat))
            return
        columns = self._new(len(flat)).reshape(costs.shape[:-1])
        self._costs.append((columns.ravel(), flat))
        for axis, part in enumerate(parts):
            for option, own in enumerate(np.moveaxis(columns, axis, 0).reshape(costs.shape[axis], -1).tolist()):
                self._equal.append(([*own, int(self.starts[part]) + option], [1.0] * len(own) + [-1.0], 0.0))

    def clash(self, clash: Clash) -> None:
        """What is paid is at least the sum of both choices, less one."""
        column = self._new(1)
        self._costs.append((column, np.asarray(clash.costs, np.float64)[None]))
        first = self._columns(*clash.first)
        for part, counts in clash.others:
            both = [*first, *self._columns(part, counts)]
            self._below.append(([*both, int(column[0])], [1.0] * len(both) + [-1.0], 1.0))

    def separate(self, first: int, second: int) -> None:
        """Of two parts only one takes another option than its first."""
        others = [column for part in (first, second) for column in range(self.starts[part] + 1, self.starts[part + 1])]
        self._below.append((others, [1.0] * len(others), 1.0))

    def _columns(self, part: int, counts: NDArray[np.bool_]) -> list[int]:
        numbers: list[int] = (self.starts[part] + np.flatnonzero(counts)).tolist()
        return numbers

    def _new(self, count: int) -> NDArray[np.int64]:
        self.size += count
        return np.arange(self.size - count, self.size)

    def costs(self) -> NDArray[np.float64]:
        """(sums, columns)."""
        result = np.zeros((self._sums, self.size))
        for columns, costs in self._costs:  # no column twice in one of them
            result[:, columns] += costs.T
        return result

    def constraints(self) -> Iterator[LinearConstraint]:
        """One option for each part, combinations that agree with them, and clashes."""
        for rows, equal in ((self._equal, True), (self._below, False)):
            if rows:
                numbers = np.repeat(np.arange(len(rows)), [len(columns) for columns, _, _ in rows])
                columns = np.concatenate([columns for columns, _, _ in rows])
                values = np.concatenate([values for _, values, _ in rows])
                matrix = csr_array(coo_array((values, (numbers, columns)), shape=(len(rows), self.size)))
                bounds = np.array([bound for _, _, bound in rows])
                yield LinearConstraint(matrix, bounds if equal else -np.inf, bounds)


def undominated(errors: Floats, costs: Floats) -> NDArray[np.int64]:
    """The options to which none is as good in everything and better in something.

    Args:
        errors: (options,).
        costs: (options, limits).
    """
    table = np.column_stack([errors, costs])
    order = np.lexsort(table.T[::-1])
    found: list[int] = []
    for number in order.tolist():
        if not any(np.all(table[other] <= table[number]) for other in found):
            found.append(number)
    return np.array(found, np.int64)
