"""Binary and ternary weights: against brute force, and never worse than by the weights alone."""

from itertools import product

import numpy as np
import pytest
from numpy.typing import NDArray

from onnxcomp.numerics.feedback import grouped_error
from onnxcomp.numerics.scaled import TERNARY, decoded, fit_scaled, plain_scaled, signs

PATTERNS = {"binary": signs(1), "two bases": signs(2), "three bases": signs(3), "ternary": TERNARY}


def problem(rows: int, width: int, groups: int = 1) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    random = np.random.default_rng(0)
    x = random.normal(size=(groups, 200, width)) @ random.normal(size=(groups, width, width))
    return random.normal(size=(rows, width)), np.matmul(x.swapaxes(1, 2), x) / 200


def test_bits_are_patterns() -> None:
    assert signs(2).tolist() == [[-1, -1], [1, -1], [-1, 1], [1, 1]]


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("groups", [1, 2])
def test_the_inputs_matter(name: str, groups: int) -> None:
    W, H = problem(8, 24, groups)
    patterns = PATTERNS[name]
    aware, plain = (decoded(*found, patterns) for found in (fit_scaled(W, H, patterns), plain_scaled(W, patterns)))
    assert grouped_error(W - aware, H) < 0.6 * grouped_error(W - plain, H)


@pytest.mark.parametrize(("name", "count"), [("binary", 2), ("ternary", 3)])
def test_by_the_weights_alone_it_is_the_best_there_is(name: str, count: int) -> None:
    """Every assignment of levels, each with its best scale."""
    W, patterns = np.random.default_rng(1).normal(size=(1, 7)), PATTERNS[name]
    errors = []
    for choice in product(range(count), repeat=7):
        levels = patterns[list(choice), 0]
        scale = levels @ W[0] / max(levels @ levels, 1)
        errors.append(np.square(W[0] - scale * levels).sum())
    assert np.square(W - decoded(*plain_scaled(W, patterns), patterns)).sum() == pytest.approx(min(errors))


@pytest.mark.parametrize(("name", "count"), [("binary", 2), ("ternary", 3)])
def test_it_comes_near_to_the_best_of_all_assignments(name: str, count: int) -> None:
    W, H = problem(1, 6)
    patterns, moment = PATTERNS[name], H[0]
    errors = []
    for choice in product(range(count), repeat=6):
        levels = patterns[list(choice), 0]
        power = levels @ moment @ levels
        scale = levels @ moment @ W[0] / power if power else 0
        errors.append(grouped_error(W - scale * levels, H))
    found = grouped_error(W - decoded(*fit_scaled(W, H, patterns), patterns), H)
    assert min(errors) * (1 - 1e-6) <= found <= 1.3 * min(errors)


def test_more_bases_are_better() -> None:
    W, H = problem(8, 24)
    errors = [grouped_error(W - decoded(*fit_scaled(W, H, signs(n)), signs(n)), H) for n in (1, 2, 3, 4)]
    assert errors == sorted(errors, reverse=True)


def test_rows_of_zeros_and_dead_inputs_do_no_harm() -> None:
    W, H = problem(4, 6)
    W[1] = 0
    H[:, 2], H[:, :, 2] = 0, 0
    for patterns in PATTERNS.values():
        for moment in (H, np.zeros_like(H)):
            found = decoded(*fit_scaled(W, moment, patterns), patterns)
            assert np.isfinite(found).all()
            np.testing.assert_allclose(found[1], 0, atol=1e-9)
