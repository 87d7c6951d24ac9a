"""The knapsack: against all choices there are."""

from itertools import product

import numpy as np
import pytest

from onnxcomp.numerics.choice import choose, undominated


@pytest.mark.parametrize("seed", range(8))
def test_it_finds_the_best_of_all_choices(seed: int) -> None:
    random = np.random.default_rng(seed)
    sizes = random.integers(1, 5, size=5)
    errors = [random.random(size) for size in sizes]
    costs = [random.random((size, 2)) for size in sizes]
    limits = np.array([2.2, 2.5])
    totals = {
        combination: sum(error[number] for error, number in zip(errors, combination, strict=True))
        for combination in product(*map(range, sizes))
        if np.all(sum(cost[number] for cost, number in zip(costs, combination, strict=True)) <= limits)
    }
    found = choose(errors, costs, limits)
    if not totals:
        assert found is None
        return
    assert found is not None
    assert totals[tuple(found)] == pytest.approx(min(totals.values()), rel=2e-4)  # the gap that is allowed


def test_what_is_worse_in_everything_is_dropped() -> None:
    errors, costs = np.array([1.0, 2.0, 0.5, 1.0]), np.array([[3.0], [3.0], [4.0], [3.0]])
    assert sorted(undominated(errors, costs).tolist()) in ([0, 2], [2, 3])


def test_many_layers_take_no_more_than_what_is_left() -> None:
    random = np.random.default_rng(0)
    costs = [np.sort(random.random(20))[:, None] for _ in range(60)]
    errors = [np.sort(random.random(20))[::-1] for _ in range(60)]
    found = choose(errors, costs, np.array([18.0]))
    assert found is not None
    assert sum(cost[number, 0] for cost, number in zip(costs, found, strict=True)) <= 18 * (1 + 1e-6)
