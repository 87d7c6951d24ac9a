"""What the graph reads from a stored matrix is what the formula says, for every layout, block and way of reading."""

from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from numpy.typing import NDArray

from onnxcomp.decode import (
    CONTRIB,
    PackedMatrix,
    StoredMatrix,
    View,
    can_look_up,
    even_block,
    kernel_block,
    stored_bytes,
)
from onnxcomp.graph import Builder
from onnxcomp.numerics.affine import spread_blocks

VIEWS = {
    "conv": View((8, 3, 5, 5), (8, 75), (0, 1)),
    "transposed": View((40, 24), (40, 24), (1, 0)),
    "grouped": View((6, 4, 3), (2, 3, 12), (0, 2, 1)),
}


def random(*shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def formula(packed: PackedMatrix) -> NDArray[np.floating]:
    """W[r, c] = s[r, b] (q[r, c] - z[r, b]), written out."""
    width = packed.integers.shape[1]
    zeros: NDArray[np.float64] | float = 2.0 ** (packed.bits - 1)
    if packed.zero_point is not None:
        zeros = spread_blocks(packed.zero_point, packed.block, width).astype(np.float64)
    return (packed.integers - zeros) * spread_blocks(packed.scale, packed.block, width).astype(np.float64)


class Harness:
    """A graph whose one node is where the stored matrix is read."""

    def __init__(self, dtype: ir.DataType, shape: list[int | str]) -> None:
        self.input = ir.val("input", dtype, shape)
        self.node = ir.node("Cast", [self.input], {"to": ir.DataType.FLOAT}, name="read")
        self.node.outputs[0].name, self.node.outputs[0].type = "unused", ir.TensorType(ir.DataType.FLOAT)
        self.graph = ir.Graph([self.input], [], nodes=[self.node], opset_imports={"": 13, CONTRIB: 1}, name="harness")
        self.builder = Builder(self.graph)

    def run(self, output: ir.Value, fed: NDArray[Any]) -> NDArray[Any]:
        output.shape = None
        self.graph.outputs.append(output)
        content = ir.to_proto(ir.Model(self.graph, ir_version=8)).SerializeToString()
        session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
        return np.asarray(session.run([output.name], {"input": fed})[0])


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("name", VIEWS)
def test_decoding_inverts_packing(name: str, bits: int, symmetric: bool) -> None:
    view = VIEWS[name]
    tensor = random(*view.shape)
    matrix = view.matrix(tensor)
    if bits == 1:  # the searched grids begin at 2 bits; here only the layout matters
        packed = PackedMatrix((matrix > 0).astype(np.uint8), np.ones((len(matrix), 1), np.float32), None, 1, 80)
    else:
        packed = PackedMatrix.nearest(matrix, bits, even_block(view.columns, 32, bits), symmetric=symmetric)
    harness = Harness(ir.DataType.FLOAT, [1])
    decoded = StoredMatrix(harness.builder, packed, "w").decoded(view, ir.DataType.FLOAT, harness.node)
    got = harness.run(decoded, np.zeros(1, np.float32))
    assert got.shape == view.shape
    np.testing.assert_allclose(view.matrix(got), formula(packed), rtol=1e-6)  # one float32 product
    if bits == 8:  # half a step, and the searched range may cut a little off
        np.testing.assert_allclose(got, tensor, atol=0.02)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "columns", "block"), [(4, 96, 32), (8, 96, 32), (4, 70, 70), (8, 33, 33)])
def test_lookup_reads_rows(bits: int, columns: int, block: int, symmetric: bool) -> None:
    packed = PackedMatrix.nearest(random(50, columns), bits, block, symmetric=symmetric)
    assert can_look_up(columns, block)
    harness = Harness(ir.DataType.INT64, ["batch", "length"])
    rows = StoredMatrix(harness.builder, packed, "w").looked_up(harness.input, harness.builder, harness.node)
    indices = np.array([[3, 49, 0], [7, 7, 11]])
    np.testing.assert_allclose(harness.run(rows, indices), formula(packed)[indices], rtol=1e-6)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "columns", "block"), [(4, 96, 32), (8, 96, 32), (4, 100, 64), (4, 160, 32)])
def test_product_multiplies_by_the_transpose(bits: int, columns: int, block: int, symmetric: bool) -> None:
    packed = PackedMatrix.nearest(random(24, columns), bits, block, symmetric=symmetric)
    harness = Harness(ir.DataType.FLOAT, ["batch", columns])
    product = StoredMatrix(harness.builder, packed, "w").multiplied(harness.input, harness.builder, harness.node, 0)
    data = random(5, columns)
    np.testing.assert_allclose(harness.run(product, data), data @ formula(packed).T, rtol=1e-4, atol=1e-4)


def test_nearest_is_within_half_a_step_of_what_it_covers() -> None:
    matrix = random(16, 64)
    packed = PackedMatrix.nearest(matrix, 8, 64)
    steps = np.abs(matrix - formula(packed)) / packed.scale
    covered = (packed.integers > 0) & (packed.integers < 255)
    assert covered.mean() > 0.9
    assert steps[covered].max() <= 0.5 + 1e-4  # of a step, by rounding to the nearest in float32


@pytest.mark.parametrize(
    ("columns", "wanted", "bits", "size"),
    [(384, 128, 4, 128), (144, 32, 4, 30), (27, 32, 4, 28), (27, 32, 8, 27), (384, None, 4, 384), (9, None, 2, 12)],
)
def test_even_blocks_waste_little(columns: int, wanted: int | None, bits: int, size: int) -> None:
    assert even_block(columns, wanted, bits) == size


@pytest.mark.parametrize(
    ("columns", "wanted", "size"),
    [
        (384, 128, 128),
        (64, 128, 64),
        (100, 128, None),
        (112, 128, 128),
        (72, 32, None),
        (384, None, None),
        (512, None, 512),
    ],
)
def test_kernel_blocks_are_powers_of_two(columns: int, wanted: int | None, size: int | None) -> None:
    assert kernel_block(columns, wanted) == size


def test_stored_bytes_are_what_a_file_holds() -> None:
    packed = PackedMatrix.nearest(random(10, 70), 4, 32, symmetric=False)
    harness = Harness(ir.DataType.FLOAT, ["batch", 70])
    StoredMatrix(harness.builder, packed, "w").multiplied(harness.input, harness.builder, harness.node, 0)
    held = sum(value.const_value.nbytes for value in harness.graph.initializers.values() if value.const_value)
    assert 0 <= stored_bytes(10, 70, 4, 32, symmetric=False) - held <= 10 * 3  # zero points count unpacked
