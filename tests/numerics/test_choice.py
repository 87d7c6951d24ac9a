"""The knapsack: against all choices there are."""

import ctypes
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.optimize import milp

from onnxcomp.numerics import choice
from onnxcomp.numerics.choice import Clash, Term, choose, choose_together, undominated


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


@pytest.mark.parametrize("seed", range(12))
def test_costs_of_several_parts_together_and_clashes_count(seed: int) -> None:
    """Against all choices: pairs, a triple, a pair that depends on one part only, and a cost that is paid once."""
    random = np.random.default_rng(seed)
    sizes = random.integers(2, 4, size=5).tolist()
    scopes = [(0,), (1,), (0, 1), (3, 1), (1, 2, 4)]
    terms = [Term(scope, random.random((*(sizes[part] for part in scope), 3))) for scope in scopes]
    terms.append(Term((2, 3), np.broadcast_to(random.random((1, sizes[3], 3)), (sizes[2], sizes[3], 3))))
    sets = [random.random(size) < 0.5 for size in sizes]
    clashes = [Clash((0, sets[0]), ((2, sets[2]), (3, sets[3])), np.array([0.3, 0.4, 0.1]))]
    limits = np.array([2.4, 2.6])

    def cost(chosen: tuple[int, ...]) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
        total = sum(np.asarray(term.costs)[tuple(chosen[part] for part in term.parts)] for term in terms)
        for clash in clashes:
            (first, own), others = clash.first, clash.others
            if own[chosen[first]] and any(counts[chosen[part]] for part, counts in others):
                total = total + clash.costs
        return np.asarray(total)

    totals = {chosen: cost(chosen)[0] for chosen in product(*map(range, sizes)) if np.all(cost(chosen)[1:] <= limits)}
    found = choose_together(sizes, terms, clashes, limits)
    if not totals:
        assert found is None
        return
    assert found is not None
    assert np.all(cost(tuple(found))[1:] <= limits * (1 + 1e-6))
    assert totals[tuple(found)] == pytest.approx(min(totals.values()), rel=2e-4)  # the gap that is allowed


@pytest.mark.parametrize("limit", [0.0, 1e-15, 1e-9])
def test_a_limit_of_nothing_leaves_what_costs_nothing(limit: float, recwarn: pytest.WarningsRecorder) -> None:
    terms = [Term((part,), np.array([[1.0, 0.0], [0.0, 0.5 + part]])) for part in range(2)]
    assert choose_together([2, 2], terms, (), np.array([limit])) == [0, 0]
    assert not recwarn.list


@pytest.mark.parametrize("seed", range(4))
def test_of_parts_that_exclude_each_other_one_stays_as_it_is(seed: int) -> None:
    random = np.random.default_rng(seed)
    sizes, limit, apart = [3, 2, 3], 1.5, [(0, 1), (1, 2)]
    terms = [Term((part,), random.random((size, 2))) for part, size in enumerate(sizes)]

    def cost(chosen: Sequence[int]) -> NDArray[np.float64]:
        return np.asarray(sum(term.costs[chosen[part]] for part, term in enumerate(terms)))

    totals = {
        chosen: float(cost(chosen)[0])
        for chosen in product(*map(range, sizes))
        if cost(chosen)[1] <= limit and not any(chosen[one] and chosen[other] for one, other in apart)
    }
    found = choose_together(sizes, terms, (), np.array([limit]), apart=apart)
    assert found is not None
    assert totals[tuple(found)] == pytest.approx(min(totals.values()), rel=2e-4)


def test_two_hundred_layers_of_fifty_options_under_three_limits_are_solved_within_the_gap() -> None:
    random = np.random.default_rng(0)
    errors = [np.sort(random.random(50)) for _ in range(200)]
    costs = [np.sort(random.random((50, 3)), axis=0)[::-1] for _ in range(200)]
    limits = 0.4 * np.sum([own.max(axis=0) for own in costs], axis=0)
    found = choose(errors, costs, limits)
    assert found is not None
    assert np.all(sum(own[number] for own, number in zip(costs, found, strict=True)) <= limits * (1 + 1e-6))
    total = sum(own[number] for own, number in zip(errors, found, strict=True))
    # What the Lagrangian says cannot be beaten: for each layer by itself, with prices on the costs.
    bound = max(
        sum((own + price * cost.sum(axis=1)).min() for own, cost in zip(errors, costs, strict=True))
        - price * limits.sum()
        for price in np.linspace(0, 2, 81)
    )
    assert total <= bound * 1.01


@pytest.mark.skipif(sys.platform == "win32", reason="the C library goes by another name")
def test_what_the_solver_prints_stays_out_of_the_results(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def talkative(*given: Any, **named: Any) -> Any:
        ctypes.CDLL(None).puts(b"tmpSolver.run();")
        return milp(*given, **named)

    monkeypatch.setattr(choice, "milp", talkative)
    sys.stdout.write("before\n")
    assert choose([np.array([1.0, 0.0])], [np.array([[0.0], [1.0]])], np.array([1.0])) == [1]
    sys.stdout.write("after\n")
    sys.stdout.flush()
    ctypes.CDLL(None).fflush(None)
    assert capfd.readouterr().out == "before\nafter\n"


def test_solvers_in_several_threads_leave_stdout_where_it_was(capfd: pytest.CaptureFixture[str]) -> None:
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: choose([np.ones(2)] * 20, [np.ones((2, 1))] * 20, np.array([20.0])), range(40)))
    os.write(1, b"still here")
    assert None not in found
    assert capfd.readouterr().out == "still here"
