"""Matrices of few bits: how they are stored, and the nodes that read them.

    W[r, c] = s[r, b] (q[r, c] - z[r, b])    for column c in block b

Integers are unsigned and packed along the columns, lowest bits first, each block in bytes of its own: the layout of
ONNX Runtime's `MatMulNBits` and `GatherBlockQuantized`. A stored matrix is read in three ways: multiplied, looked up
row by row, or decoded whole. Decoding uses plain operators (BitShift, Concat, Cast, Sub, Mul, Reshape, Transpose,
Slice), which ONNX Runtime folds when it loads a model, as it does not fold DequantizeLinear: a decoded weight is small
in the file, and from then on a float tensor like any other.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import ArrayLike, NDArray

from onnxcomp.graph import Builder, constant_of
from onnxcomp.numerics.affine import IntGrid, quantize, spread_blocks
from onnxcomp.numerics.pack import pack
from onnxcomp.numerics.ranges import blockwise

CONTRIB = "com.microsoft"
"""Domain of ONNX Runtime's own operators."""

_LEAST_BLOCK = 16


@dataclass(frozen=True)
class View:
    """A tensor of any rank seen as a matrix: reshape to `split`, transpose to `order`, the last axis is the columns.

    Attributes:
        shape: of the tensor.
        split: shape after the first step.
        order: axes of `split`, rows first.
    """

    shape: tuple[int, ...]
    split: tuple[int, ...]
    order: tuple[int, ...]

    @property
    def columns(self) -> int:
        """Columns of the matrix."""
        return self.split[self.order[-1]]

    def matrix(self, tensor: NDArray[Any]) -> NDArray[Any]:
        """The tensor as (rows, columns)."""
        return tensor.reshape(self.split).transpose(self.order).reshape(-1, self.columns)

    def tensor(self, matrix: NDArray[Any]) -> NDArray[Any]:
        """The inverse of `matrix`."""
        moved = matrix.reshape([self.split[axis] for axis in self.order])
        return moved.transpose(np.argsort(self.order)).reshape(self.shape)


@dataclass(frozen=True, eq=False)
class PackedMatrix:
    """A matrix of integers with a scale, and maybe a zero point, for each row and block of columns.

    Attributes:
        integers: (rows, columns) uint8, below 2^bits.
        scale: (rows, blocks) float32.
        zero_point: (rows, blocks) uint8, or None for 2^(bits - 1) everywhere.
        bits: 1, 2, 4 or 8.
        block: columns per block, in whole bytes; the last block is filled up.
    """

    integers: NDArray[np.uint8]
    scale: NDArray[np.float32]
    zero_point: NDArray[np.uint8] | None
    bits: int
    block: int

    @classmethod
    def nearest(
        cls, matrix: NDArray[np.floating], bits: int, block: int, *, symmetric: bool = True, search: bool = True
    ) -> "PackedMatrix":
        """A matrix (rows, columns) rounded to the nearest integers.

        Args:
            matrix: its values.
            bits: of each integer.
            block: columns that share a scale.
            symmetric: without zero points.
            search: for scales that keep the squared error least.
        """
        grid = IntGrid(bits, signed=False, symmetric=symmetric)
        scale, zero_point = blockwise(matrix, block, grid, search=search)
        width = matrix.shape[1]
        zeros: ArrayLike = grid.middle if zero_point is None else spread_blocks(zero_point, block, width)
        integers = quantize(matrix, spread_blocks(scale, block, width), zeros, grid)
        offsets = None if zero_point is None else zero_point.astype(np.uint8)
        return cls(integers.astype(np.uint8), scale, offsets, bits, block)

    @property
    def blocks(self) -> int:
        """Blocks per row."""
        return int(self.scale.shape[1])

    @property
    def width(self) -> int:
        """Columns as stored: whole blocks."""
        return self.blocks * self.block


def stored_bytes(rows: int, columns: int, bits: int, block: int, *, symmetric: bool) -> int:
    """Bytes that a packed matrix of this size takes."""
    blocks = rows * -(-columns // block)
    return blocks * (block * bits // 8 + 4) + (0 if symmetric else blocks)


def even_block(columns: int, block: int | None, bits: int) -> int:
    """The largest block up to the wanted one that cuts the columns into equal parts, as near as whole bytes allow.

    Args:
        columns: of the matrix.
        block: wanted columns per block; None for one block per row.
        bits: per integer.
    """
    size = -(-columns // -(-columns // (block or columns)))
    per_byte = 8 // bits
    return -(-size // per_byte) * per_byte


def kernel_block(columns: int, block: int | None) -> int | None:
    """The block that `MatMulNBits` takes for the wanted one: a power of two, at least 16.

    Returns:
        None where it would store more than a fifth of padding.
    """
    power = max(_LEAST_BLOCK, 1 << (columns - 1).bit_length())
    size = power if block is None else min(max(_LEAST_BLOCK, 1 << block.bit_length() - 1), power)
    return size if -(-columns // size) * size <= 1.25 * columns else None


def can_look_up(columns: int, block: int) -> bool:
    """Whether `GatherBlockQuantized` can read rows of so many columns stored in these blocks."""
    return block == columns or (columns % block == 0 and block >= _LEAST_BLOCK and block & (block - 1) == 0)


def lookups(model: ir.Model) -> dict[ir.Value, list[ir.Node]]:
    """The nodes that look up rows of each constant float32 table (rows, columns)."""
    found: dict[ir.Value, list[ir.Node]] = {}
    for node in model.graph.all_nodes():
        table = node.inputs[0] if node.op_type == "Gather" and node.domain == "" else None
        content = constant_of(table)
        if table is None or content is None or not table.is_initializer():
            continue
        if content.ndim == 2 and content.dtype == np.float32 and node.attributes.get_int("axis", 0) == 0:
            found.setdefault(table, []).append(node)
    return found


class StoredMatrix:
    """A packed matrix in a graph: its constants, made once, and the nodes that read them.

    Args:
        builder: of the graph that owns the constants.
        packed: the matrix.
        name: what the new names begin with.
    """

    def __init__(self, builder: Builder, packed: PackedMatrix, name: str) -> None:
        self._builder, self.packed, self._name = builder, packed, name
        self._constants: dict[str, ir.Value] = {}

    def multiplied(self, data: ir.Value, builder: Builder, before: ir.Node, accuracy_level: int) -> ir.Value:
        """`data` times the transpose of the matrix, by `MatMulNBits`; the block must be a `kernel_block`.

        Args:
            data: (..., columns).
            builder: of the graph of `before`.
            before: the node that this one goes before, and whose output it resembles.
            accuracy_level: 4 where `data` may be rounded to int8 for each block, 0 where not.
        """
        rows, columns = self.packed.integers.shape
        data_bytes = self._data((rows, self.packed.blocks, -1))
        return builder.node(
            "MatMulNBits", [data, data_bytes, self._scale(), *self._zeros()], f"{before.name}_nbits", domain=CONTRIB,
            like=before.outputs[0], before=before, K=columns, N=rows, bits=self.packed.bits,
            block_size=self.packed.block, accuracy_level=accuracy_level,
        )  # fmt: skip

    def looked_up(self, indices: ir.Value, builder: Builder, before: ir.Node) -> ir.Value:
        """The rows at `indices` as floats, by `GatherBlockQuantized`; only where `can_look_up`."""
        rows, columns = self.packed.integers.shape
        block = self.packed.block if self.packed.blocks > 1 else 1 << (max(columns, _LEAST_BLOCK) - 1).bit_length()
        inputs = [self._data((rows, -1)), indices, self._scale(), *self._zeros()]
        return builder.node(
            "GatherBlockQuantized", inputs, f"{before.name}_rows", domain=CONTRIB, like=before.outputs[0],
            before=before, bits=self.packed.bits, block_size=block, gather_axis=0, quantize_axis=1,
        )  # fmt: skip

    def decoded(self, view: View, dtype: ir.DataType, before: ir.Node) -> ir.Value:
        """The whole tensor as floats, for ONNX Runtime to fold.

        Args:
            view: as which the matrix was taken from the tensor.
            dtype: of the result.
            before: the node of the builder's own graph that the new ones go before.
        """
        packed = self.packed
        rows, columns = packed.integers.shape

        def node(operator: str, inputs: Sequence[ir.Value], dtype: ir.DataType | None = None, **rest: Any) -> ir.Value:
            name = f"{self._name}_{operator.lower()}"
            return self._builder.node(operator, inputs, name, dtype=dtype or inputs[0].dtype, before=before, **rest)

        def reshaped(value: ir.Value, shape: Sequence[int]) -> ir.Value:
            return node("Reshape", [value, self._integers(shape)])

        value = self._data((rows, -1))
        if packed.bits < 8:
            value = node("Concat", self._unpacked(reshaped(value, [-1, 1]), node), axis=1)
        value = reshaped(value, [rows, packed.blocks, packed.block])
        value = node("Cast", [value], ir.DataType.FLOAT, to=ir.DataType.FLOAT)
        value = node("Mul", [node("Sub", [value, self._centre()]), reshaped(self._scale(), [rows, packed.blocks, 1])])
        if packed.width > columns:
            ends = [self._integers([end]) for end in (0, columns, 1)]
            value = node("Slice", [reshaped(value, [rows, packed.width]), *ends])
        if view.order != tuple(range(len(view.order))):
            value = reshaped(value, [view.split[axis] for axis in view.order])
            value = node("Transpose", [value], perm=[int(axis) for axis in np.argsort(view.order)])
        value = reshaped(value, view.shape)
        if dtype != ir.DataType.FLOAT:
            value = node("Cast", [value], dtype, to=dtype)
        value.shape = ir.Shape(view.shape)
        return value

    def _unpacked(self, column: ir.Value, node: Any) -> list[ir.Value]:
        """The integers at each position of a byte. Shifting left drops what is above, shifting right what is below."""
        bits, parts = self.packed.bits, []
        down = self._constant(f"shift_{8 - bits}", np.uint8(8 - bits))
        for position in range(8 // bits):
            above = 8 - bits * (position + 1)
            up = self._constant(f"shift_{above}", np.uint8(above))
            parts.append(node("BitShift", [node("BitShift", [column, up], direction="LEFT"), down], direction="RIGHT"))
        return parts

    def _data(self, shape: tuple[int, ...]) -> ir.Value:
        filled = np.zeros((len(self.packed.integers), self.packed.width), np.uint8)
        filled[:, : self.packed.integers.shape[1]] = self.packed.integers
        return self._constant("packed", pack(filled, self.packed.bits).reshape(shape))

    def _scale(self) -> ir.Value:
        return self._constant("scale", self.packed.scale)

    def _zeros(self) -> list[ir.Value]:
        """Zero points packed along the blocks, where there are any."""
        zeros = self.packed.zero_point
        return [] if zeros is None else [self._constant("zeros", pack(zeros, self.packed.bits))]

    def _centre(self) -> ir.Value:
        zeros = self.packed.zero_point
        middle = np.float32(1 << self.packed.bits - 1)
        return self._constant("centre", middle if zeros is None else zeros[..., None].astype(np.float32))

    def _integers(self, elements: Sequence[int]) -> ir.Value:
        return self._constant("_".join(str(e) for e in elements), np.asarray(elements, np.int64))

    def _constant(self, role: str, array: ArrayLike) -> ir.Value:
        if role not in self._constants:
            self._constants[role] = self._builder.constant(array, f"{self._name}_{role}")
        return self._constants[role]
