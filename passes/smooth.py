"""SmoothQuant: activation outliers move into the weights, without any change of function.

    X W  =  (X S^-1) (S W),      s_j = max|X_j|^alpha / max|W_j|^(1 - alpha)

(Xiao et al. 2022, "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models", eq. 4.)
One scale serves all of an activation, and a few channels that are far larger than the others take it for themselves;
weights are easier, for each of their output channels has its own. S^-1 goes into what comes before:

1. gain and shift of a normalisation that only layers read;
2. the projection to the values of an attention, for the output projection;
3. a linear layer, through Relu and its like;
4. a Mul put in front of the layers, where it is asked for: a residual that reads the activation must not see S.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from onnxcomp.calibration import calibrate
from onnxcomp.core import Change, Context, Outcome, Pass, Skip, name_nodes
from onnxcomp.graph import Builder, prepared
from onnxcomp.layers import Layer, layers
from onnxcomp.numerics.affine import IntGrid, fake_quantize, parameters_from_range
from onnxcomp.numerics.equalize import smooth
from onnxcomp.observations import Observed, Statistics
from onnxcomp.rescale import Site, obstacle, scale_readers, sites
from onnxcomp.settings import within

_OPSET = 13
_ALPHAS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
_WORTHWHILE = 0.95
"""Share of the error that smoothing must get below: the estimate is no more exact than that."""


@dataclass(frozen=True)
class Smooth(Pass):
    """SmoothQuant in front of matrix products.

    Attributes:
        alpha: how much of the difficulty moves into the weights, 0 to 1; None chooses by activation, and leaves
            alone what would not gain.
        insert: put a Mul in front of the layers where nothing before them can take the scales.
    """

    name: ClassVar[str] = "smooth"
    summary: ClassVar[str] = "SmoothQuant: activation outliers move into the weights of matrix products"
    exact: ClassVar[bool] = True
    needs_data: ClassVar[bool] = True

    alpha: Annotated[float, within(0, 1)] | None = None
    insert: bool = False

    def apply(self, model: ir.Model, context: Context) -> Outcome:
        """Calibrate, choose the scales of each activation, and fold them in."""
        if context.data is None:
            return Outcome(model, (), (Skip("model", "smoothing needs calibration data (--calib)"),))
        converted = prepared(model, _OPSET)
        if isinstance(converted, str):
            return Outcome(model, (), (Skip("model", converted),))
        name_nodes(converted)
        places, skips = self._places(converted, context)
        values = [Observed(place.value, axis=-1) for place in places]
        statistics = calibrate(converted, context.data, context, values, [place.readers[0] for place in places])
        changes = []
        for place in places:
            scales = self._scales(place, statistics)
            if scales is None:
                skips.append(Skip(place.readers[0].name, "smoothing its input would not lower the error"))
                continue
            place.rescale(scales)
            changes += [Change(reader.name, f"input smoothed by {place.by}") for reader in place.readers]
        return Outcome(converted if changes else model, tuple(changes), tuple(skips))

    def _places(self, model: ir.Model, context: Context) -> "tuple[list[_Place], list[Skip]]":
        places, skips = [], []
        for layer, site in sites(model):
            place = _Place(site.value, site.readers, site) if isinstance(site, Site) else site
            if isinstance(place, str) and self.insert:
                readers = tuple(
                    other for other in layers(model) if other.data is layer.data and obstacle(other) is None
                )
                place = _Place(layer.data, readers, None) if readers else place
            if not isinstance(place, str) and (reason := _unsuitable(place, model, context)) is not None:
                place = reason
            if isinstance(place, str):
                skips.append(Skip(layer.name, place))
            else:
                places.append(place)
        return places, skips

    def _scales(self, place: "_Place", statistics: Statistics) -> NDArray[np.float64] | None:
        seen = statistics.tensors[place.value.name or ""]
        squares = statistics.grams[place.readers[0].name].second_moment[0]
        weights = [reader.matrix() for reader in place.readers]
        largest = np.max([np.abs(W).max(axis=0) for W in weights], axis=0)
        if self.alpha is not None:
            return smooth(seen.absolute_maximum, largest, self.alpha)
        trials = [smooth(seen.absolute_maximum, largest, alpha) for alpha in _ALPHAS]
        errors = [int8_error(weights, squares, seen.low, seen.high, scales) for scales in trials]
        before = int8_error(weights, squares, seen.low, seen.high, np.ones_like(largest))
        return trials[int(np.argmin(errors))] if min(errors) < _WORTHWHILE * before else None


@dataclass(frozen=True, eq=False)
class _Place:
    """An activation and its layers; the site that takes the scales, or None where a Mul must."""

    value: ir.Value
    readers: tuple[Layer, ...]
    site: Site | None

    @property
    def by(self) -> str:
        """What takes the scales."""
        if self.site is None:
            return "a Mul"
        return f"'{self.site.layer.name}'" if self.site.layer else f"'{self.site.vectors[0][0].name}'"

    def rescale(self, scales: NDArray[np.float64]) -> None:
        if self.site is not None:
            self.site.rescale(scales)
            return
        first = self.readers[0].node
        assert isinstance(first.graph, ir.Graph)
        builder = Builder(first.graph)
        assert self.value.dtype is not None
        factors = builder.constant((1 / scales).astype(self.value.dtype.numpy()), f"{self.value.name}_smoothing")
        smoothed = builder.node(
            "Mul", [self.value, factors], f"{self.value.name}_smooth", like=self.value, before=first
        )
        scale_readers(self.readers, scales)
        for reader in self.readers:
            reader.node.replace_input_with(1 - reader.index, smoothed)


def _unsuitable(place: _Place, model: ir.Model, context: Context) -> str | None:
    if any(reader.kernel for reader in place.readers):
        return "a convolution's input has no outlier channels worth moving; 'equalize' is for these"
    if any(reader.input_axis == 0 for reader in place.readers):
        return "its input channels do not lie along the last axis"
    if any(reader.node.graph is not model.graph for reader in place.readers):
        return "inside a control-flow body, where activations cannot be observed"
    if place.value.shape is None or place.value.dtype is None:
        return "the shape of its input is not known"
    if any(context.excludes(reader.node) for reader in place.readers):
        return "excluded by the user"
    return None


def int8_error(
    weights: Sequence[NDArray[np.floating]],
    squares: NDArray[np.float64],
    low: NDArray[np.float64],
    high: NDArray[np.float64],
    scales: NDArray[np.float64],
) -> float:
    """Expected squared error of the layers in INT8 after smoothing.

    Activations: noise of step^2 / 12 per element, where 255 steps cover the whole range. Weights: int8 per output
    channel, rounded to the nearest, dW H dW^T.

    Args:
        weights: (out, in) of each layer.
        squares: (in, in) H = E[x x^T] of the input.
        low: (in,) least value of each input channel.
        high: (in,) largest value of each input channel.
        scales: (in,) that divide the input.
    """
    step = (max(float((high / scales).max()), 0.0) - min(float((low / scales).min()), 0.0)) / 255
    smoothed = squares / np.outer(scales, scales)
    grid = IntGrid(8, signed=True, symmetric=True)
    error = 0.0
    for W in weights:
        scaled = W * scales
        magnitudes = np.abs(scaled).max(axis=1)
        parameters = parameters_from_range(-magnitudes, magnitudes, grid)
        dW = fake_quantize(scaled, parameters.scale[:, None].astype(np.float64), 0, grid) - scaled
        error += step**2 / 12 * float(np.square(scaled).sum()) + float(np.einsum("oi,oi->", dW @ smoothed, dW))
    return error
