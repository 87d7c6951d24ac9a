"""What a layer's weights bear: how fast its spectrum falls, and what few bits cost, by the covariance of its inputs."""

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from onnxcomp.calibration import calibrate
from onnxcomp.core import Context
from onnxcomp.layers import Layer, layers
from onnxcomp.numerics.codebook import kmeans
from onnxcomp.numerics.feedback import grouped_error
from onnxcomp.numerics.lowrank import LowRank
from onnxcomp.report import WeightRow
from onnxcomp.splitting import kernel_of

_BITS = range(1, 9)
_SHARES = np.linspace(0, 1, 17)[1:]
"""Of the full rank, at which the spectrum is told."""
_BORNE = 0.01
"""Relative squared error of the layer's output that counts as borne."""


def weight_rows(model: ir.Model, context: Context) -> Iterator[WeightRow]:
    """The main graph's layers in order; without data as if their inputs were white noise."""
    found = [layer for layer in layers(model) if layer.node.graph is model.graph and np.isfinite(layer.matrix()).all()]
    grams = calibrate(model, context.data, context, layers=found).grams if context.data is not None else {}
    for layer in found:
        gram = grams.get(layer.name)
        if gram is None:
            H = np.repeat(np.eye(layer.input_width)[None], layer.groups, axis=0)
        else:
            H = gram.covariance if layer.adds_bias else gram.second_moment
        yield _row(layer, H)


def _row(layer: Layer, H: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> WeightRow:
    matrix = layer.matrix().astype(np.float64)
    energy = grouped_error(matrix, H) or 1.0
    weight = np.diagonal(H, axis1=1, axis2=2)
    errors = [grouped_error(matrix - kmeans(matrix, weight, 1 << bits).decoded(), H) / energy for bits in _BITS]
    borne = [bits for bits, error in zip(_BITS, errors, strict=True) if error <= _BORNE]
    spectrum: tuple[float, ...] = ()
    ranks: tuple[int, ...] = (0, 0)
    if layer.groups == 1 and layer.node.op_type != "ConvTranspose":
        kept = np.cumsum(LowRank(kernel_of(layer), H[0]).spectrum)
        kept = kept / (kept[-1] or 1.0)
        ranks = tuple(int(np.argmax(kept >= share)) + 1 for share in (0.9, 0.99))
        places = np.ceil(_SHARES * len(kept)).astype(int) - 1
        spectrum = tuple(kept[places].tolist())
    return WeightRow(
        layer.name, layer.weight_shape, len(matrix), ranks[0], ranks[1], spectrum, tuple(errors), min(borne, default=0)
    )
