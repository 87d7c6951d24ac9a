"""Scales per channel that move range from where quantization hurts to where it does not, leaving the function as is.

A layer's outputs are divided by s and the next layer's inputs multiplied by s: exact across ReLU (s > 0), which is
positively homogeneous. Every scale here is positive and finite; a channel with nothing on either side keeps s = 1.
"""

import numpy as np
from numpy.typing import NDArray

from onnxcomp.numerics.arrays import Floats


def cross_layer(W1: Floats, b1: Floats | None, W2: Floats) -> NDArray[np.float64]:
    """Cross-layer equalization: s_i = sqrt(r1_i r2_i) / r2_i, with r the largest magnitude of a channel's weights.

    Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction", eq. 11. W1 / s and
    W2 * s then have equal ranges. The scaled bias b1 / s is kept from passing the largest original bias, which
    would widen the activations' range instead. A depthwise layer is fine on either side; for three layers with a
    depthwise one in the middle apply this to each pair in turn until both scales are near 1.

    Args:
        W1: (channels, ...) weights of the first layer.
        b1: (channels,) its bias, or None.
        W2: (out, channels, ...) weights of the second layer, or (channels, 1, ...) if it is depthwise.

    Returns:
        (channels,) scales: the first layer's weights and bias are divided by them, W2's channels multiplied.
    """
    depthwise = W2.shape[1] == 1 and W2.shape[0] == W1.shape[0]
    first, second = _ranges(W1, 0), _ranges(W2, 0 if depthwise else 1)
    scales = _ratio(np.sqrt(first * second), second)
    if b1 is not None and b1.any():
        magnitudes = np.abs(b1).astype(np.float64)
        scales = np.maximum(scales, magnitudes / magnitudes.max())
    return scales


def smooth(act_absmax: Floats, weight_absmax: Floats, alpha: float = 0.5) -> NDArray[np.float64]:
    """SmoothQuant: s_j = max|X_j|^alpha / max|W_j|^(1 - alpha), Xiao et al. 2022, eq. 4.

    Args:
        act_absmax: (channels,) largest magnitude of each input channel.
        weight_absmax: (channels,) largest magnitude of the weights that it meets.
        alpha: 0 leaves all difficulty with the activations, 1 moves all of it into the weights.

    Returns:
        (channels,) scales: activations are divided by them, weights multiplied.
    """
    activations, weights = act_absmax.astype(np.float64), weight_absmax.astype(np.float64)
    dead = (activations == 0) | (weights == 0)
    # 0**0 is 1, which would scale a dead channel by the other side alone.
    return _ratio(np.where(dead, 0.0, activations**alpha), weights ** (1 - alpha))


def _ranges(W: Floats, axis: int) -> NDArray[np.float64]:
    rows = np.moveaxis(W, axis, 0).reshape(W.shape[axis], -1)
    ranges: NDArray[np.float64] = np.abs(rows).max(axis=1, initial=0.0).astype(np.float64)
    return ranges


def _ratio(numerator: NDArray[np.float64], denominator: NDArray[np.float64]) -> NDArray[np.float64]:
    """The quotient, 1 where either is zero."""
    return np.divide(numerator, denominator, out=np.ones_like(numerator), where=(numerator > 0) & (denominator > 0))
