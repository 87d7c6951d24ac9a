"""A layer's weights on an integer grid, with as little change of the layer's output as calibration allows."""

from collections.abc import Hashable, Iterable
from dataclasses import dataclass, replace
from typing import Annotated, Any, NamedTuple, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from onnxcomp.core import Context
from onnxcomp.executors import mapped
from onnxcomp.layers import Layer
from onnxcomp.numerics.affine import IntGrid, dequantize, quantize, spread_blocks
from onnxcomp.numerics.blas import one_thread
from onnxcomp.numerics.gptq import polish, round_gptq
from onnxcomp.numerics.ranges import blockwise
from onnxcomp.observations import Gram
from onnxcomp.settings import within

WeightBits: TypeAlias = Annotated[int, within(2, 8)]
"""Bits of the weights of kernels for 8-bit integers."""


@dataclass(frozen=True)
class Rounding:
    """How weights meet their grid; each step can be switched off.

    Attributes:
        gptq: error feedback by the Gram matrix (Frantar 2022) instead of rounding each weight to the nearest.
        sweeps: of coordinate descent afterwards; 0 for none.
        bias_correction: the mean of what rounding does to the output goes into the bias.
        search: of the scales with the least error; else the largest weight sets a scale.
    """

    gptq: bool = True
    sweeps: Annotated[int, within(0)] = 3
    bias_correction: bool = True
    search: bool = True

    @property
    def needs_gram(self) -> bool:
        """Whether any step uses calibration data."""
        return self.gptq or self.sweeps > 0 or self.bias_correction


NEAREST = Rounding(gptq=False, sweeps=0, bias_correction=False)
DRAFTED = replace(NEAREST, search=False)
"""For timing: the kernels are the same whatever the weights."""


@dataclass(frozen=True, eq=False)
class RoundedWeights:
    """Integers and what they stand for.

    Attributes:
        integers: (out, in) in the grid's dtype.
        scale: (out, blocks) float32.
        zero_point: (out, blocks) in the grid's dtype, or None for a symmetric grid.
        bias_shift: (out,) to add to the layer's bias.
    """

    integers: NDArray[np.integer]
    scale: NDArray[np.float32]
    zero_point: NDArray[np.integer] | None
    bias_shift: NDArray[np.float64]


def round_weights(
    layer: Layer,
    grid: IntGrid,
    rounding: Rounding,
    gram: Gram | None,
    *,
    block: int | None = None,
    least_scale: NDArray[np.floating] | float = 0.0,
    matrix: NDArray[np.floating] | None = None,
    cache: dict[Hashable, Any] | None = None,
) -> RoundedWeights:
    """Round a layer's matrix, group by group.

    Args:
        layer: the layer.
        grid: the integers.
        rounding: which steps.
        gram: of the layer's inputs; without it weights are rounded to the nearest.
        block: inputs that share a scale; None for one scale per output channel.
        least_scale: (out,) or scalar lower bound of the scales.
        matrix: (out, in) to round instead of the layer's own.
        cache: remembers what the Gram matrix was needed for, which takes long.
    """
    if cache is not None and gram is not None and matrix is None:
        key = _key(layer, grid, rounding, gram, block, least_scale)
        if key not in cache:
            cache[key] = round_weights(layer, grid, rounding, gram, block=block, least_scale=least_scale)
        return cast(RoundedWeights, cache[key])
    full = layer.matrix() if matrix is None else matrix
    return _rounded(_Matrix(full, layer.groups, grid, rounding, gram, block, least_scale))


class Wanted(NamedTuple):
    """What `round_weights` will be asked for."""

    layer: Layer
    grid: IntGrid
    gram: Gram | None
    block: int | None = None
    least_scale: NDArray[np.floating] | float = 0.0


def round_ahead(wanted: Iterable[Wanted], rounding: Rounding, context: Context) -> None:
    """Let the context's executor round several layers at a time, for `round_weights` to find them in the cache.

    Without an executor, or data to learn from, nothing is done ahead.
    """
    if context.executor is None:
        return
    jobs = {}
    for layer, grid, gram, block, least in wanted:
        if gram is not None and (key := _key(layer, grid, rounding, gram, block, least)) not in context.cache:
            jobs[key] = _Matrix(layer.matrix(), layer.groups, grid, rounding, gram, block, least)
    room = context.memory // max((job.bytes for job in jobs.values()), default=1)
    for key, rounded in zip(jobs, mapped(_rounded, jobs.values(), context.executor, room), strict=True):
        context.cache[key] = rounded


def _key(
    layer: Layer,
    grid: IntGrid,
    rounding: Rounding,
    gram: Gram,
    block: int | None,
    least_scale: NDArray[np.floating] | float,
) -> tuple[Hashable, ...]:
    return "rounded", gram, layer.name, grid, rounding, block, np.asarray(least_scale).tobytes()


@dataclass(frozen=True, eq=False)
class _Matrix:
    """The weights of a layer, (out, in) of each group one after the other, and how they are to be rounded."""

    weights: NDArray[np.floating]
    groups: int
    grid: IntGrid
    rounding: Rounding
    gram: Gram | None
    block: int | None
    least_scale: NDArray[np.floating] | float

    @property
    def bytes(self) -> int:
        """Of its arrays."""
        return self.weights.nbytes + (0 if self.gram is None else self.gram.total.nbytes)


@one_thread()
def _rounded(matrix: _Matrix) -> RoundedWeights:
    full, groups, grid, rounding, gram = matrix.weights, matrix.groups, matrix.grid, matrix.rounding, matrix.gram
    rows = len(full) // groups
    width = matrix.block or full.shape[1]
    bounds = np.broadcast_to(np.asarray(matrix.least_scale, np.float32), (len(full),))
    parts = []
    for group in range(groups):
        part = slice(group * rows, (group + 1) * rows)
        W = full[part]
        H = None if gram is None else gram.second_moment[group]
        scale, zero_point = blockwise(W, width, grid, H, search=rounding.search)
        scale = np.maximum(scale, bounds[part, None])
        wide_scale = spread_blocks(scale, width, W.shape[1])
        wide_zero: NDArray[np.generic] | int = (
            grid.middle if zero_point is None else spread_blocks(zero_point, width, W.shape[1])
        )
        if H is not None and rounding.gptq:
            integers = round_gptq(W, H, wide_scale, wide_zero, grid)
        else:
            integers = quantize(W, wide_scale, wide_zero, grid)
        if H is not None and rounding.sweeps:
            integers = polish(W, H, integers, wide_scale, wide_zero, grid, rounding.sweeps)
        parts.append((integers, scale, zero_point))
    zero_points = [zero for _, _, zero in parts if zero is not None]
    rounded = RoundedWeights(
        np.concatenate([integers for integers, _, _ in parts]),
        np.concatenate([scale for _, scale, _ in parts]),
        np.concatenate(zero_points) if zero_points else None,
        np.zeros(len(full)),
    )
    if gram is None or not rounding.bias_correction:
        return rounded
    return replace(rounded, bias_shift=mean_error(full, rounded, gram, grid, matrix.block))


def mean_error(
    matrix: NDArray[np.floating], rounded: RoundedWeights, gram: Gram, grid: IntGrid, block: int | None = None
) -> NDArray[np.float64]:
    """What rounding takes from each output on average: (out,) of (W - W') E[x], to be added to the bias.

    Args:
        matrix: (out, in) before rounding.
        rounded: the same after it.
        gram: of the layer's inputs.
        grid: the integers.
        block: inputs that share a scale; None for one scale per output channel.
    """
    width = matrix.shape[1]
    zero_point = grid.middle if rounded.zero_point is None else spread_blocks(rounded.zero_point, block or width, width)
    lost = matrix - dequantize(rounded.integers, spread_blocks(rounded.scale, block or width, width), zero_point)
    grouped = lost.astype(np.float64).reshape(len(gram.mean), -1, width)
    errors: NDArray[np.float64] = np.matmul(grouped, gram.mean[:, :, None]).reshape(-1)
    return errors
