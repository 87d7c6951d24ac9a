"""Group OBS against brute force and the closed form."""

import itertools

import numpy as np
import pytest

from onnxcomp.numerics.obs import Consumer, eliminate, refit, survivors, swapped


def problem(seed: int, out: int = 5, channels: int = 4, taps: int = 2) -> Consumer:
    random = np.random.default_rng(seed)
    width = channels * taps
    x = random.normal(size=(200, width)) @ random.normal(size=(width, width))
    columns = np.arange(width).reshape(channels, taps)
    return Consumer(random.normal(size=(out, width)), x.T @ x / len(x), columns)


def error_of(consumer: Consumer, removed: tuple[int, ...]) -> float:
    """The least relative error with channels gone, by the normal equations."""
    W, H = consumer.weight, consumer.second_moment
    kept = np.ones(len(H), bool)
    kept[consumer.columns[list(removed)].ravel()] = False
    V = np.zeros_like(W)
    if kept.any():
        V[:, kept] = np.linalg.solve(H[np.ix_(kept, kept)], H[kept] @ W.T).T
    return float(np.trace((W - V) @ H @ (W - V).T) / np.trace(W @ H @ W.T))


@pytest.mark.parametrize("out", [5, 12], ids=["wide", "tall"])
@pytest.mark.parametrize("seed", range(5))
def test_errors_are_those_of_the_normal_equations(seed: int, out: int) -> None:
    consumer = problem(seed, out)
    found = eliminate([consumer], damping=1e-12)
    for count in range(len(found.order) + 1):
        assert found.errors[count] == pytest.approx(error_of(consumer, tuple(found.order[:count])), rel=1e-6, abs=1e-9)
    assert found.errors[-1] == pytest.approx(1)


@pytest.mark.parametrize("seed", range(5))
def test_the_first_to_go_is_the_cheapest_of_all(seed: int) -> None:
    consumers = [problem(seed), problem(seed + 100)]
    best = min(range(4), key=lambda channel: sum(error_of(c, (channel,)) for c in consumers))
    assert eliminate(consumers, damping=1e-12).order[0] == best


def test_greedy_is_not_far_from_the_best_pair() -> None:
    for seed in range(5):
        consumer = problem(seed, channels=6)
        best = min(error_of(consumer, pair) for pair in itertools.combinations(range(6), 2))
        assert eliminate([consumer], damping=1e-12).errors[2] <= 2 * best


@pytest.mark.parametrize("seed", range(6))
def test_swaps_end_where_no_single_swap_helps(seed: int) -> None:
    """From a bad choice, by brute force; also where other channels' columns lie between."""
    whole = problem(seed, channels=7)
    consumers = [Consumer(whole.weight, whole.second_moment, whole.columns[:6]), problem(seed + 100, channels=6)]

    def total(gone: list[int]) -> float:
        return sum(error_of(consumer, tuple(gone)) for consumer in consumers)

    first = [0, 1, 2]
    found = swapped(consumers, np.array(first), damping=1e-12).tolist()
    assert len(set(found)) == 3
    assert total(found) <= total(first)
    back = min(found, key=lambda channel: total([other for other in found if other != channel]))
    for leaves in set(range(6)) - set(found):
        assert total([leaves, *(other for other in found if other != back)]) >= total(found) * (1 - 1e-5)


def test_some_bad_choices_are_swapped() -> None:
    before = after = 0.0
    for seed in range(6):
        consumer = problem(seed, channels=8)
        before += error_of(consumer, (0, 1, 2))
        after += error_of(consumer, tuple(swapped([consumer], np.array([0, 1, 2]), damping=1e-12)))
    assert after < 0.8 * before


def test_survivors_are_the_least_squares_solution() -> None:
    consumer = problem(0)
    kept = np.array([True] * 5 + [False] * 3)
    W, H = consumer.weight, consumer.second_moment
    expected = np.linalg.solve(H[np.ix_(kept, kept)], H[kept] @ W.T).T
    np.testing.assert_allclose(survivors(W, H, kept, damping=0), expected, rtol=1e-8)


def test_refit_finds_the_map_and_stays_where_nothing_is_known() -> None:
    random = np.random.default_rng(0)
    x = random.normal(size=(500, 6))
    x[:, 5] = 0  # never seen
    true = random.normal(size=(3, 6))
    start = random.normal(size=(3, 6))
    fitted = refit(start, x.T @ x / 500, true @ x.T @ x / 500, damping=1e-9)
    np.testing.assert_allclose(fitted[:, :5], true[:, :5], rtol=1e-5)
    np.testing.assert_allclose(fitted[:, 5], start[:, 5])


def test_wide_groups_go_many_at_a_time_at_little_cost() -> None:
    random = np.random.default_rng(0)
    x = random.normal(size=(2000, 256)) * np.linspace(0.1, 2, 256)
    W = random.normal(size=(8, 256))
    found = eliminate([Consumer(W, x.T @ x / len(x), np.arange(256)[:, None])])
    assert sorted(found.order.tolist()) == list(range(256))
    assert (np.diff(found.errors) >= 0).all()
