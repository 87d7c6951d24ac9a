"""What times depend on, and what of them is known already."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from onnxcomp import profiling
from onnxcomp.core import Context
from onnxcomp.model import structure_hash
from onnxcomp.profiling import Profile
from onnxcomp.runtime import Target
from onnxcomp.store import Store
from onnxcomp.timing import profiles
from tests.passes.test_prune_depth import residual
from tests.planned import made_up


def trained_again(model: ir.Model) -> ir.Model:
    copy = model.clone()
    for name, value in copy.graph.initializers.items():
        assert value.const_value is not None
        if value.const_value.dtype == ir.DataType.FLOAT:
            value.const_value = ir.tensor(np.float32(1.1) * value.const_value.numpy(), name=name)
    return copy


def test_times_of_a_model_that_was_trained_again_are_known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    measured: list[int] = []

    def measure(models: Sequence[ir.Model], *_: object) -> list[Profile]:
        measured.append(len(models))
        return made_up(models)

    monkeypatch.setattr(profiling, "profiles", measure)
    context = Context(None, Target(threads=1), store=Store(tmp_path))
    model, feeds = residual(1, 0.5), {"image": np.zeros((2, 3, 8, 8), np.float32)}
    first = profiles([model], context, feeds)
    assert profiles([trained_again(model)], context, feeds) == first
    assert measured == [1]
    profiles([residual(1, 0.5, 0.7)], context, feeds)
    profiles([model], context, {"image": np.zeros((4, 3, 8, 8), np.float32)})
    assert measured == [1, 1, 1]


def test_zero_points_and_sizes_count_and_weights_and_their_types_do_as_types() -> None:
    def holding(**tensors: object) -> str:
        values = [ir.val(n, const_value=ir.tensor(np.asarray(array), name=n)) for n, array in tensors.items()]
        graph = ir.Graph([], [], nodes=[], initializers=values, opset_imports={"": 17})
        return structure_hash(ir.Model(graph, ir_version=8))

    weights, points = np.ones((16, 16), np.int8), np.zeros(16, np.int8)
    same = holding(w=weights, p=points, sizes=np.array([1, 2]), scale=np.ones(16, np.float32))
    assert holding(w=2 * weights, p=points, sizes=np.array([1, 2]), scale=np.full(16, 0.5, np.float32)) == same
    assert holding(w=weights, p=points - 1, sizes=np.array([1, 2]), scale=np.ones(16, np.float32)) != same
    assert holding(w=weights, p=points, sizes=np.array([1, 3]), scale=np.ones(16, np.float32)) != same
    assert holding(w=weights.astype(np.uint8), p=points, sizes=np.array([1, 2]), scale=np.ones(16, np.float32)) != same
