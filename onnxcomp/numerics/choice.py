"""One option for each part, with the least summed error that several limits allow: a multiple-choice knapsack."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from onnxcomp.numerics.arrays import Floats

_GAP = 1e-4
_SECONDS = 10.0


def choose(errors: Sequence[Floats], costs: Sequence[Floats], limits: Floats) -> list[int] | None:
    """The options to take, by branch and bound (HiGHS; Huangfu and Hall 2018).

    Args:
        errors: of each part (options,).
        costs: of each part (options, limits).
        limits: (limits,) of the sums of costs.

    Returns:
        For each part the number of its option, within 1e-4 of the least error; None where no choice keeps the limits.
    """
    kept = [undominated(*part) for part in zip(errors, costs, strict=True)]
    sizes = [len(numbers) for numbers in kept]
    if not sizes:
        return []
    objective = np.concatenate([error[numbers] for error, numbers in zip(errors, kept, strict=True)])
    rows = np.concatenate([cost[numbers] for cost, numbers in zip(costs, kept, strict=True)]).T
    scale = np.maximum(np.abs(limits), np.finfo(float).tiny)
    parts = np.repeat(np.arange(len(sizes)), sizes)
    one_each = csr_array((np.ones(len(parts)), (parts, np.arange(len(parts)))))
    found = milp(
        objective / (np.abs(objective).max() or 1.0),
        integrality=np.ones(len(objective), np.int64),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(rows / scale[:, None], -np.inf, np.asarray(limits) / scale),
        ],
        options={"mip_rel_gap": _GAP, "time_limit": _SECONDS},
    )
    if found.x is None:
        return None
    starts = np.cumsum([0, *sizes])
    chosen = [int(np.argmax(found.x[start:stop])) for start, stop in pairwise(starts)]
    return [int(numbers[number]) for numbers, number in zip(kept, chosen, strict=True)]


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
