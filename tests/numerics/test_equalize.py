import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from onnxcomp.numerics.equalize import cross_layer, smooth

Array = NDArray[np.float64]
magnitudes = arrays(np.float64, 6, elements=st.one_of(st.just(0.0), st.floats(1e-6, 1e6)))


def channel_ranges(W: Array, axis: int) -> Array:
    others = tuple(i for i in range(W.ndim) if i != axis)
    ranges: Array = np.abs(W).max(axis=others)
    return ranges


def layers(seed: int) -> tuple[Array, Array, Array]:
    rng = np.random.default_rng(seed)
    W1 = rng.normal(size=(6, 3, 3, 3)) * np.geomspace(1e-2, 1e2, 6)[:, None, None, None]
    return W1, rng.normal(size=6) * 0.01, rng.normal(size=(4, 6, 1, 1))


def test_ranges_become_equal_and_the_function_stays() -> None:
    W1, b1, W2 = (part.reshape(len(part), -1) if part.ndim > 1 else part for part in layers(0))
    s = cross_layer(W1, None, W2)
    np.testing.assert_allclose(channel_ranges(W1 / s[:, None], 0), channel_ranges(W2 * s, 1), rtol=1e-12)
    x = np.random.default_rng(1).normal(size=(27, 10))
    before = W2 @ np.maximum(W1 @ x + b1[:, None], 0)
    after = (W2 * s) @ np.maximum((W1 / s[:, None]) @ x + (b1 / s)[:, None], 0)
    np.testing.assert_allclose(after, before, rtol=1e-9)


def test_matches_the_papers_equation_on_kernels() -> None:
    W1, _, W2 = layers(2)
    r1, r2 = channel_ranges(W1, 0), channel_ranges(W2, 1)
    np.testing.assert_allclose(cross_layer(W1, None, W2), np.sqrt(r1 * r2) / r2, rtol=1e-12)


def test_a_scaled_bias_does_not_pass_the_largest_one() -> None:
    W1, _, W2 = layers(3)
    b1 = np.array([5.0, 0.0, -1.0, 2.0, 0.1, 3.0])
    s = cross_layer(W1, b1, W2)
    assert np.abs(b1 / s).max() <= 5.0 * (1 + 1e-12)
    free = cross_layer(W1, None, W2)
    assert s[0] > free[0]  # the narrow channel with the large bias is held back
    np.testing.assert_array_equal(s[[1, 5]], free[[1, 5]])


@pytest.mark.parametrize("dead", ["first", "second"])
def test_dead_channels_keep_their_scale(dead: str) -> None:
    W1, b1, W2 = layers(4)
    if dead == "first":
        W1[2] = 0
    else:
        W2[:, 2] = 0
    s = cross_layer(W1, b1, W2)
    assert s[2] == 1.0
    assert np.all(np.isfinite(s) & (s > 0))


def test_pairs_around_a_depthwise_layer_settle_at_the_threefold_equalization() -> None:
    """Nagel et al. 2019, appendix A: all three ranges become (r1 r2 r3)^(1/3)."""
    rng = np.random.default_rng(5)
    W1, W3 = rng.normal(size=(6, 3)) * np.geomspace(0.1, 10, 6)[:, None], rng.normal(size=(4, 6))
    depthwise = rng.normal(size=(6, 1, 3, 3))
    expected = np.cbrt(channel_ranges(W1, 0) * channel_ranges(depthwise, 0) * channel_ranges(W3, 1))
    for _ in range(30):
        s = cross_layer(W1, None, depthwise)
        W1, depthwise = W1 / s[:, None], depthwise * s[:, None, None, None]
        s = cross_layer(depthwise, None, W3)
        depthwise, W3 = depthwise / s[:, None, None, None], W3 * s
    for W, axis in ((W1, 0), (depthwise, 0), (W3, 1)):
        np.testing.assert_allclose(channel_ranges(W, axis), expected, rtol=1e-9)


def test_smooth_is_the_papers_equation() -> None:
    activations, weights = np.array([100.0, 1.0, 0.25]), np.array([1.0, 4.0, 0.5])
    np.testing.assert_allclose(smooth(activations, weights), [10.0, 0.5, np.sqrt(0.5)])
    np.testing.assert_allclose(smooth(activations, weights, alpha=0.75), [100**0.75, 4**-0.25, 0.25**0.75 * 0.5**-0.25])
    # At one half both sides end up with the same range.
    s = smooth(activations, weights)
    np.testing.assert_allclose(activations / s, weights * s)


@given(magnitudes, magnitudes, st.sampled_from([0.0, 0.3, 0.5, 1.0]))
def test_smooth_is_positive_and_leaves_dead_channels(activations: Array, weights: Array, alpha: float) -> None:
    s = smooth(activations, weights, alpha)
    assert np.all(np.isfinite(s) & (s > 0))
    np.testing.assert_array_equal(s[(activations == 0) | (weights == 0)], 1.0)
