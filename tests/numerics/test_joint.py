"""Layers fitted together: gradients against differences, and errors against fitting one by one."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from onnxcomp.numerics import joint
from onnxcomp.numerics.joint import Link, Part

Array = NDArray[Any]


def relu(x: Array) -> Array:
    return np.maximum(x, 0)


def link(weight: Array, function: Callable[[Array], Array] = relu, bias: bool = True) -> Link:
    """A matrix product over the last axis; weight (groups, out, in)."""
    groups, _, width = weight.shape

    def rows(x: Array) -> Array:
        return np.swapaxes(x.reshape(len(x), groups, width), 0, 1)

    def from_rows(found: Array, shape: tuple[int, ...]) -> Array:
        return np.swapaxes(found, 0, 1).reshape(shape)

    start = np.zeros(weight.shape[:2]) if bias else None
    return Link(weight, start, rows, from_rows, lambda found, _: found, lambda output: output, function)


def problem(groups: int = 1, bias: bool = True) -> tuple[list[Link], list[Part]]:
    """Three layers, a wider teacher, and 400 samples in three parts."""
    random = np.random.default_rng(0)
    x = random.normal(size=(400, 8)).astype(np.float32)
    teacher = [random.normal(size=shape) / np.sqrt(shape[1]) for shape in ((12, 8), (12, 12), (5, 12))]
    y = relu(relu(x @ teacher[0].T) @ teacher[1].T) @ teacher[2].T
    second = random.normal(size=(groups, 6 // groups, 6 // groups)) / 2
    links = [
        link(teacher[0][None, :6], bias=bias),
        link(second, np.tanh, bias=bias),
        link(random.normal(size=(1, 5, 6)), bias=bias),
    ]
    return links, [Part(x[part], y[part].astype(np.float32)) for part in (slice(150), slice(150, 300), slice(300, 400))]


@pytest.mark.parametrize(("groups", "bias"), [(1, True), (2, True), (3, False)])
def test_gradients_are_those_of_differences(groups: int, bias: bool) -> None:
    links, parts = problem(groups, bias)
    with ThreadPoolExecutor(2) as pool:
        chain = joint._Chain(links, parts, 0, 1e-2, pool)
        random = np.random.default_rng(1)
        point = 0.1 * random.normal(size=chain.size)
        _, gradient = chain.loss(point)
        for _ in range(5):
            way = random.normal(size=chain.size)
            way /= np.linalg.norm(way)
            change = (chain.loss(point + 1e-3 * way)[0] - chain.loss(point - 1e-3 * way)[0]) / 2e-3
            assert gradient @ way == pytest.approx(change, rel=0.03, abs=3e-3 * float(np.linalg.norm(gradient)))


def error(links: list[Link], parts: list[Part]) -> float:
    """The squared error of what the last layer gives, summed; of layers of one group, with biases."""
    total = 0.0
    for part in parts:
        data = part.data
        for each in links:
            assert each.bias is not None
            given = data @ each.weight[0].T + each.bias[0]
            data = each.function(given)
        total += float(np.square(given - part.target).sum())
    return total


def test_fitting_together_beats_the_last_layer_alone() -> None:
    links, parts = problem()
    hidden = [np.tanh(relu(part.data @ links[0].weight[0].T) @ links[1].weight[0].T) for part in parts]
    inputs = np.concatenate([np.concatenate(hidden), np.ones((400, 1))], axis=1)
    solved = np.linalg.lstsq(inputs, np.concatenate([part.target for part in parts]))[0].T
    links[2] = replace(links[2], weight=solved[None, :, :-1], bias=solved[None, :, -1])
    alone = error(links, parts)
    fitted = joint.fit(links, parts)
    better = [replace(old, weight=weight, bias=bias) for old, (weight, bias) in zip(links, fitted, strict=True)]
    assert error(better, parts) < 0.8 * alone
    again = joint.fit(links, parts)
    assert all(np.array_equal(first[0], second[0]) for first, second in zip(fitted, again, strict=True))


def test_steps_end_where_others_lose() -> None:
    links, parts = problem()
    *known, other = parts
    fitted = joint.fit(links, known, [other])
    better = [replace(old, weight=weight, bias=bias) for old, (weight, bias) in zip(links, fitted, strict=True)]
    assert error(better, [other]) < 0.2 * error(links, [other])  # measured: 0.10
    hidden = np.tanh(relu(other.data @ links[0].weight[0].T) @ links[1].weight[0].T)
    as_it_is = Part(other.data, (hidden @ links[2].weight[0].T).astype(np.float32))
    for old, (weight, _) in zip(links, joint.fit(links, known, [as_it_is]), strict=True):
        np.testing.assert_array_equal(weight, old.weight)


def test_nothing_to_learn_from_stays_as_it_was() -> None:
    links, parts = problem()
    silent = [Part(np.zeros_like(part.data), np.zeros_like(part.target)) for part in parts]
    for old, (weight, _) in zip(links, joint.fit(links, silent), strict=True):
        np.testing.assert_array_equal(weight, old.weight)
