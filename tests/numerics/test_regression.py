"""Ridge regression from sums."""

import numpy as np
import pytest

from onnxcomp.numerics.regression import Moments, best_damping

RANDOM = np.random.default_rng(0)
X, W = RANDOM.normal(2.0, 1.0, (2, 300, 5)), RANDOM.normal(size=(2, 3, 5))
B = RANDOM.normal(size=(2, 3))
Y = np.swapaxes(X @ np.swapaxes(W, 1, 2) + B[:, None], 1, 2)


def summed() -> Moments:
    """Of all vectors, batch by batch."""
    total = Moments()
    for start in range(0, 300, 64):
        total += Moments.of(X[:, start : start + 64], Y[:, :, start : start + 64])
    return total


def test_batches_add_up_to_what_least_squares_finds() -> None:
    centred = summed().centred(biased=True)
    found = centred.fitted(np.zeros_like(W), 1e-12)
    np.testing.assert_allclose(found, W, rtol=1e-8, atol=1e-8)
    np.testing.assert_allclose(centred.y - (found @ centred.x[..., None])[..., 0], B, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("biased", [False, True])
def test_differences_of_errors_are_those_of_all_vectors(biased: bool) -> None:
    moments, others = summed().centred(biased=biased), (W + 0.1, W - 0.3)
    x, y = (X - X.mean(1, keepdims=True), Y - Y.mean(2, keepdims=True)) if biased else (X, Y)
    first, second = (float(np.sum((other @ np.swapaxes(x, 1, 2) - y) ** 2) / 300) for other in others)
    assert moments.error(others[0]) - moments.error(others[1]) == pytest.approx(first - second)


@pytest.mark.parametrize(("noise", "known", "best"), [(0.0, 0.0, 0.1), (3.0, 1.0, 10.0)])
def test_more_damping_is_better_where_there_is_but_noise_to_fit(noise: float, known: float, best: float) -> None:
    noisy = Y + noise * np.random.default_rng(1).normal(size=Y.shape)
    fitted, others = Moments.of(X[:, :20], noisy[:, :, :20]), Moments.of(X[:, 20:], noisy[:, :, 20:])
    assert best_damping((0.1, 10.0), fitted, others, known * W, biased=True) == best
    assert best_damping((10.0, 0.1), fitted, Moments(), known * W, biased=True) == 0.1
