"""Activations from inside a model: what is kept saves work and changes nothing."""

from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from onnxcomp import prefix
from onnxcomp.core import Context
from onnxcomp.layers import layers
from onnxcomp.passes.prune_depth import PruneDepth
from onnxcomp.prefix import Prefix
from onnxcomp.runtime import Session
from onnxcomp.samples import Dataset
from tests.passes.small import context
from tests.passes.test_prune_depth import residual


@pytest.fixture
def model() -> ir.Model:
    return residual(1.0, 1.0)


@pytest.fixture
def given() -> Context:
    return context(100)


def values_of(model: ir.Model, given: Context, names: list[str]) -> list[NDArray[Any]]:
    """Of all samples, by a session of the whole model."""
    copy = model.clone()
    inside = {value.name: value for node in copy.graph for value in node.outputs}
    copy.graph.outputs[:] = [inside[name] for name in names]
    session = Session(copy, given.target)
    data = given.data
    assert data is not None
    found = [session.run(batch.feeds, names) for batch in data.batches(len(data))]
    return [found[0][name] for name in names]


def data_of(given: Context) -> Dataset:
    assert given.data is not None
    return given.data


@pytest.mark.parametrize("memory", [10**9, 10])
@pytest.mark.parametrize("settled", [False, True])
def test_values_are_the_same_whatever_was_kept(
    model: ir.Model,
    given: Context,
    memory: int,
    settled: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cut = Prefix(model, data_of(given), Context(given.data, given.target, memory=memory))
    inside = [value for node in model.graph for value in node.outputs if node.op_type != "Constant"]
    starts: list[set[str]] = []
    part_between = prefix.part_between

    def noted(whole: ir.Model, start: set[str], names: list[str]) -> ir.Model:
        starts.append(start)
        return part_between(whole, start, names)

    monkeypatch.setattr(prefix, "part_between", noted)
    for place, value in enumerate(inside):
        keep = [value] if settled else []
        parts = [arrays[0] for _, arrays in cut.runs([value], starts=place == 0, settled=keep)]
        (expected,) = values_of(model, given, [value.name or ""])
        np.testing.assert_allclose(np.concatenate(parts), expected, rtol=1e-5, atol=1e-5)
    first = inside[0].name or ""
    if memory == 10:
        assert starts == [set()] * len(inside)
    elif settled:
        assert starts[-1] == {value.name for value in inside[:-1]}
    else:
        assert starts[1:] == [{first}] * (len(inside) - 1)


@pytest.mark.parametrize("jointly", [False, True])
def test_layers_are_fitted_to_the_same_whatever_was_kept(model: ir.Model, given: Context, jointly: bool) -> None:
    fitted = []
    for memory in (2 * 10**9, 10**6):  # the second keeps nothing, but has room for layers in a row
        made = PruneDepth(0.9, jointly=jointly)(model, replace(given, memory=memory, cache={})).model
        fitted.append([layer.matrix() for layer in layers(made)])
    assert len(fitted[0]) < len(list(layers(model)))
    for one, other in zip(*fitted, strict=True):
        # The last layer reads means that hardly vary: 1e-6 of its input are 1e-3 of its weights.
        np.testing.assert_allclose(one, other, rtol=0, atol=2e-3)
