"""What weights bear: against layers whose rank and bits are known."""

import numpy as np
import onnx_ir as ir
import pytest

from onnxcomp.core import Context
from onnxcomp.inspection import inspect
from onnxcomp.layers import layers
from onnxcomp.tolerance import weight_rows
from tests.passes.small import context, network


def with_matrix(change: object) -> ir.Model:
    model = network().clone()
    for layer in layers(model):
        layer.set_matrix(change(layer.matrix().astype(np.float64)))  # type: ignore[operator]
    return model


@pytest.mark.parametrize("data", [context(8), Context()], ids=["with data", "without"])
def test_rank_and_bits_are_those_of_the_weights(data: Context) -> None:
    random = np.random.default_rng(0)

    def low(matrix: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> object:
        return random.normal(size=(len(matrix), 2)) @ random.normal(size=(2, matrix.shape[1]))

    for row in weight_rows(with_matrix(low), data):
        assert 1 <= row.rank_90 <= row.rank_99 <= 2
        assert row.spectrum[-1] == pytest.approx(1)
    for row in weight_rows(with_matrix(lambda matrix: np.sign(matrix) * 0.1), data):
        assert row.bits == 1
        assert max(row.errors) < 1e-6


def test_inspect_shows_it() -> None:
    shown = inspect(network(), weights=True)
    assert [row.name for row in shown.weights] == [layer.name for layer in layers(network())]
    for row in shown.weights:
        assert 0 < row.rank_90 <= row.rank_99 <= row.outputs
        assert list(row.errors) == sorted(row.errors, reverse=True)
        assert list(row.spectrum) == sorted(row.spectrum)
    assert not inspect(network()).weights
