"""Layers in a row fitted together, so that what the last one gives comes near to what is wanted.

Fitted one by one, each layer is to give what it gave before; but what is left of the first ones may serve the last one
better as something else. Fitting a block of layers to the block's output is block reconstruction (Li et al. 2021,
"BRECQ", section 3.2). Steps are those of L-BFGS (Liu and Nocedal 1989) in coordinates Z in which the curvature is near
the identity: with H = E[x x^T] of a layer's inputs and A = E[g g^T] of the derivatives of what the block gives by what
the layer gives, the Gauss-Newton matrix is about A (x) H (Martens and Grosse 2015, equation 1), so

    W = W0 + s M^-T Z K,    A = M M^T,    H = L L^T,    K = L^-1

A row of ones beside x stands for the bias.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

from onnxcomp.numerics.blas import one_thread

Tensor: TypeAlias = NDArray[np.floating[Any]]
Floats: TypeAlias = NDArray[np.float64]

_STEPS = 24
"""At most."""
_WORTH = 0.003
"""Of the error on samples held out, that each step must have gained on average for another one."""
_ESTIMATED = 4
"""One part in so many tells the curvature."""
_STEP = 1e-3
"""Of a difference quotient, as a share of the root mean square of what the function is applied to."""


@dataclass(frozen=True, eq=False)
class Link:
    """One of the layers, and the function between it and the next.

    Attributes:
        weight: (groups, out, in) its matrices.
        bias: (groups, out), or None where it adds none.
        rows: the input vectors (groups, n, in) that it takes from a tensor.
        from_rows: the adjoint of `rows`, for a tensor of some shape.
        output: the tensor that (n, groups * out) output vectors make, for an input of some shape.
        output_rows: the inverse of `output`.
        function: element by element, on what this layer gives; the last layer's is not used.
    """

    weight: Floats
    bias: Floats | None
    rows: Callable[[Tensor], Tensor]
    from_rows: Callable[[Tensor, tuple[int, ...]], Tensor]
    output: Callable[[Tensor, tuple[int, ...]], Tensor]
    output_rows: Callable[[Tensor], Tensor]
    function: Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Part:
    """Some of the samples.

    Attributes:
        data: what the first layer takes.
        target: (n, groups * out) what the last one is to give.
    """

    data: Tensor
    target: Tensor


def fit(
    links: Sequence[Link],
    parts: Sequence[Part],
    held_out: Sequence[Part] = (),
    seed: int = 0,
    damping: float = 0.1,
) -> list[tuple[Floats, Floats | None]]:
    """Weights and biases of layers in a row that bring the last one's output nearer to a target.

    Args:
        links: the layers.
        parts: the samples; each is taken through all layers at a time.
        held_out: others. Steps end when the error on these gains too little by them, and the result is what had the
            least; without any, it is what the last step led to.
        seed: of the random signs by which A is estimated.
        damping: added to the diagonals of A and H, as a share of their means.

    Returns:
        For each layer, as it came in.
    """
    # Parts run beside each other, each in one thread: copies then do not wait for products.
    with one_thread(), ThreadPoolExecutor(os.cpu_count()) as pool:
        chain = _Chain(links, parts, seed, damping, pool)
        start, limits = np.zeros(chain.size), {"maxiter": _STEPS, "maxfun": 2 * _STEPS}
        best, least = start, (before := chain.error(start, held_out))
        steps, first = 0, chain.loss(start)
        scale = float(np.linalg.norm(first[1])) or 1.0  # the first step, of length 1, is then along the whole gradient

        def loss(point: Floats) -> tuple[float, Floats]:
            value, gradient = chain.loss(scale * point) if point.any() else first
            return value, scale * gradient

        def judge(point: Floats) -> None:
            nonlocal best, least, steps
            now = chain.error(scale * point, held_out)
            steps += 1
            if now < least:
                best, least = scale * point, now
            if now > before * (1 - _WORTH * steps):
                raise StopIteration

        found = minimize(loss, start, method="L-BFGS-B", jac=True, options=limits, callback=judge if held_out else None)  # type: ignore[call-overload]
        return chain.parameters(best if held_out else scale * found.x)


_Weights: TypeAlias = tuple[Tensor, Tensor | None]


def _missed(links: Sequence[Link], weights: Sequence[_Weights], part: Part) -> float:
    return _squared(_forward(links, weights, part.data)[1] - part.target)


@dataclass(frozen=True, eq=False)
class _Stage:
    """One layer on its way through the samples: the rows it took, from a tensor of some shape, and what it gave."""

    rows: Tensor
    shape: tuple[int, ...]
    given: Tensor


class _Chain:
    """The layers, in the coordinates that they are fitted in."""

    def __init__(self, links: Sequence[Link], parts: Sequence[Part], seed: int, damping: float, pool: Executor) -> None:
        self._links, self._parts, self._pool = links, parts, pool
        self._first = [*pool.map(links[0].rows, (part.data for part in parts))]
        self._energy = _energy(parts)
        self._left, self._right = self._coordinates(np.random.default_rng(seed), damping)
        self._shapes = [(*left.shape[:2], right.shape[1]) for left, right in zip(self._left, self._right, strict=True)]
        self._ends = np.cumsum([int(np.prod(shape)) for shape in self._shapes])
        self.size = int(self._ends[-1])

    def _coordinates(self, random: np.random.Generator, damping: float) -> tuple[list[Floats], list[Floats]]:
        """For each layer s M^-T, and K."""
        weights = [_single(link.weight, link.bias) for link in self._links]
        some = self._parts[::_ESTIMATED]
        signs = [random.choice(np.array([-1, 1], np.float32), part.target.shape) for part in some]
        moments: list[Any] = [0.0] * len(weights)
        curvatures: list[Any] = [0.0] * len(weights)
        counts = [0] * len(weights)
        for found in self._pool.map(partial(self._moments, weights), some, self._first[::_ESTIMATED], signs):
            for place, (inputs, derivatives, vectors) in enumerate(found):
                moments[place] += inputs
                curvatures[place] += derivatives
                counts[place] += vectors
        left: list[Floats] = []
        right: list[Floats] = []
        for moment, curvature, count in zip(moments, curvatures, counts, strict=True):
            whitened = np.linalg.inv(_root(curvature / count, damping))
            left.append(np.asarray(np.sqrt(_energy(some) / count) * np.swapaxes(whitened, 1, 2), np.float64))
            right.append(np.asarray(np.linalg.inv(_root(moment / count, damping)), np.float64))
        return left, right

    def _moments(
        self, weights: Sequence[_Weights], part: Part, first: Tensor, signs: Tensor
    ) -> list[tuple[Floats, Floats, int]]:
        """By layer, sums of x x^T and g g^T over one part, and over how many vectors."""
        stages, _ = _forward(self._links, weights, part.data, first)
        found = []
        for (_, bias), stage, gradient in zip(
            weights, stages, _backward(self._links, weights, stages, signs), strict=True
        ):
            x = stage.rows
            if bias is not None:
                x = np.concatenate([x, np.ones((*x.shape[:2], 1), x.dtype)], axis=2)
            moment, curvature = (np.asarray(np.swapaxes(v, 1, 2) @ v, np.float64) for v in (x, gradient))
            found.append((moment, curvature, x.shape[1]))
        return found

    def parameters(self, point: Floats) -> list[tuple[Floats, Floats | None]]:
        """Weights and biases at a point of the coordinates."""
        result: list[tuple[Floats, Floats | None]] = []
        for link, piece, shape, left, right in zip(
            self._links, np.split(point, self._ends[:-1]), self._shapes, self._left, self._right, strict=True
        ):
            change = left @ piece.reshape(shape) @ right
            bias = None if link.bias is None else link.bias + change[..., -1]
            result.append((link.weight + change[..., : link.weight.shape[2]], bias))
        return result

    def error(self, point: Floats, parts: Sequence[Part]) -> float:
        """The squared error at a point on other samples, summed."""
        weights = [_single(weight, bias) for weight, bias in self.parameters(point)]
        return sum(self._pool.map(partial(_missed, self._links, weights), parts))

    def loss(self, point: Floats) -> tuple[float, Floats]:
        """Half the relative squared error at a point, and its gradient."""
        weights = [_single(weight, bias) for weight, bias in self.parameters(point)]
        total = 0.0
        sums = [np.zeros(shape) for shape in self._shapes]
        for error, parts in self._pool.map(partial(self._part, weights), self._parts, self._first):
            total += error
            for summed, part in zip(sums, parts, strict=True):
                summed += part[..., : summed.shape[2]]
        gradients = [
            np.swapaxes(left, 1, 2) @ (summed / self._energy) @ np.swapaxes(right, 1, 2)
            for left, right, summed in zip(self._left, self._right, sums, strict=True)
        ]
        return total / self._energy / 2, np.concatenate([gradient.ravel() for gradient in gradients])

    def _part(self, weights: Sequence[_Weights], part: Part, first: Tensor) -> tuple[float, list[Tensor]]:
        """The squared error on one part, and half its gradient by each layer's weight and bias, side by side."""
        stages, last = _forward(self._links, weights, part.data, first)
        missing = last - part.target
        products = []
        for stage, gradient in zip(stages, _backward(self._links, weights, stages, missing), strict=True):
            by_weight = np.swapaxes(gradient, 1, 2) @ stage.rows
            products.append(np.concatenate([by_weight, gradient.sum(1)[..., None]], axis=2))
        return _squared(missing), products


def _forward(
    links: Sequence[Link], weights: Sequence[_Weights], data: Tensor, first: Tensor | None = None
) -> tuple[list[_Stage], Tensor]:
    """Each layer's stage, and the output vectors (n, out) of the last."""
    stages: list[_Stage] = []
    for link, (weight, bias) in zip(links, weights, strict=True):
        if stages:
            data = links[len(stages) - 1].function(stages[-1].given)
        rows = first if first is not None and not stages else link.rows(data)
        made = _times(rows, np.swapaxes(weight, 1, 2))
        if bias is not None:
            made += bias[:, None]
        flat = np.swapaxes(made, 0, 1).reshape(made.shape[1], -1)
        stages.append(_Stage(rows, data.shape, link.output(flat, data.shape)))
    return stages, flat


def _backward(
    links: Sequence[Link], weights: Sequence[_Weights], stages: Sequence[_Stage], gradient: Tensor
) -> list[Tensor]:
    """By layer (groups, n, out): the derivative by what it gives, from that by what the last one gives (n, out)."""
    result: list[Tensor] = []
    for place in reversed(range(len(links))):
        weight, stage = weights[place][0], stages[place]
        grouped = np.swapaxes(gradient.reshape(len(gradient), len(weight), -1), 0, 1)
        result.append(grouped)
        if place:
            before, given = links[place - 1], stages[place - 1].given
            by_data = links[place].from_rows(_times(grouped, weight), stage.shape)
            gradient = before.output_rows(by_data * _slope(before.function, given))
    return result[::-1]


def _times(rows: Tensor, matrices: Tensor) -> Tensor:
    """Their product, with what belongs to one position far apart, as tensors of images have it."""
    product: Tensor = np.swapaxes(np.swapaxes(matrices, 1, 2) @ np.swapaxes(rows, 1, 2), 1, 2)
    return product


def _slope(function: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    """The derivative of a function that works element by element, as a difference quotient."""
    step = np.float32(_STEP * np.sqrt(np.mean(np.square(at))) or _STEP)
    slope: Tensor = (function(at + step) - function(at - step)) / (2 * step)
    return slope


def _energy(parts: Sequence[Part]) -> float:
    """Of what is wanted, about the mean of each part."""
    return sum(_squared(part.target - part.target.mean(0)) for part in parts) or 1.0


def _root(matrix: Floats, damping: float) -> Floats:
    """Lower Cholesky factors (groups, n, n) of damped matrices."""
    level = np.trace(matrix, axis1=1, axis2=2)[:, None, None] / matrix.shape[1]
    damped = matrix + np.where(level > 0, level, 1.0) * damping * np.eye(matrix.shape[1])
    return np.asarray(np.linalg.cholesky(damped), np.float64)


def _single(weight: Floats, bias: Floats | None) -> _Weights:
    return np.asarray(weight, np.float32), None if bias is None else np.asarray(bias, np.float32)


def _squared(array: Tensor) -> float:
    return float(np.square(array, dtype=np.float64).sum())
