"""Weights in few bytes: what is stored, and the nodes that make tensors of it when a session loads.

Each encoding is one of a matrix (rows, columns), as which a `View` takes a tensor. Its integers are streams, which
`Unpacker` unpacks for all weights together; the nodes of the encoding itself then make the tensor.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from onnxcomp.decode import View
from onnxcomp.unpacking import Stream, Unpacker, hashes

Values = NDArray[Any]


class Encoded(ABC):
    """A matrix in few bytes."""

    @property
    def bytes(self) -> int:
        """What is stored, without names and nodes."""
        return sum(stream.bytes for stream in self.streams(None)) + sum(array.nbytes for array in self.constants)

    @property
    @abstractmethod
    def constants(self) -> tuple[Values, ...]:
        """What is stored beside the streams."""

    @abstractmethod
    def decoded(self) -> NDArray[np.float64]:
        """The matrix (rows, columns)."""

    @abstractmethod
    def streams(self, view: View | None) -> list[Stream]:
        """The integers, in the order that `emit` takes them; None where only their number counts."""

    @abstractmethod
    def emit(self, unpacker: Unpacker, integers: Sequence[ir.Value], view: View, dtype: ir.DataType) -> ir.Value:
        """The nodes that make the tensor.

        Args:
            unpacker: of the graph.
            integers: its streams, unpacked.
            view: as which the matrix was taken from the tensor.
            dtype: of the tensor.
        """


@dataclass(frozen=True, eq=False)
class Codes(Encoded):
    """Values from a codebook, or vectors of them.

    Attributes:
        indices: (rows, columns / d) uint8, into the codebook of the row.
        values: (books, count, d) in the type that they are stored in; each book serves an equal run of rows.
        scale: (rows,) float32 that each row is multiplied by, or None.
    """

    indices: NDArray[np.uint8]
    values: Values
    scale: NDArray[np.float32] | None = None

    @property
    def constants(self) -> tuple[Values, ...]:
        """Codebooks and scales."""
        return (self.values,) if self.scale is None else (self.values, self.scale)

    def decoded(self) -> NDArray[np.float64]:
        """The matrix (rows, columns)."""
        books = np.repeat(np.arange(len(self.values)), len(self.indices) // len(self.values))
        scale = np.ones(len(self.indices)) if self.scale is None else self.scale.astype(np.float64)
        found = self.values.astype(np.float64)[books[:, None], self.indices] * scale[:, None, None]
        return np.asarray(found.reshape(len(self.indices), -1))

    @property
    def _by_element(self) -> bool:
        """Whether each element has its own index and all share one book, so that their order is free."""
        return self.values.shape[0] == self.values.shape[2] == 1 and self.scale is None

    def streams(self, view: View | None) -> list[Stream]:
        """The indices: in the tensor's own order where that can be."""
        indices = view.tensor(self.indices) if view is not None and self._by_element else self.indices
        return [Stream(indices.ravel(), self.values.shape[1])]

    def emit(self, unpacker: Unpacker, integers: Sequence[ir.Value], view: View, dtype: ir.DataType) -> ir.Value:
        """Gather from the codebook; rows have their part of it, and their scale."""
        books, count, length = self.values.shape
        (indices,) = integers
        if self._by_element:
            table = unpacker.constant(self.values.ravel(), "values")
            return unpacker.cast(unpacker.node("Gather", [table, unpacker.reshaped(indices, view.shape)]), dtype)
        if books > 1:
            begins = unpacker.integers(np.arange(books)[:, None] * count, np.int32)
            indices = unpacker.node("Add", [unpacker.reshaped(indices, [books, -1]), begins])
        table = unpacker.constant(self.values.reshape(-1, length), "values")
        value = unpacker.node("Gather", [table, indices])
        if self.scale is not None:
            value = unpacker.cast(unpacker.reshaped(value, [len(self.indices), -1]), ir.DataType.FLOAT)
            value = unpacker.node("Mul", [value, unpacker.constant(self.scale[:, None], "scale")])
        return viewed(unpacker, value, view, dtype)


@dataclass(frozen=True, eq=False)
class Sum(Encoded):
    """Several encodings of one shape, added up.

    Attributes:
        parts: one or more.
    """

    parts: tuple[Encoded, ...]

    @property
    def constants(self) -> tuple[Values, ...]:
        """Those of the parts."""
        return tuple(array for part in self.parts for array in part.constants)

    def decoded(self) -> NDArray[np.float64]:
        """The matrix (rows, columns)."""
        return np.asarray(np.sum([part.decoded() for part in self.parts], axis=0))

    def streams(self, view: View | None) -> list[Stream]:
        """Those of the parts."""
        return [stream for part in self.parts for stream in part.streams(view)]

    def emit(self, unpacker: Unpacker, integers: Sequence[ir.Value], view: View, dtype: ir.DataType) -> ir.Value:
        """Add them up."""
        result, left = None, list(integers)
        for part in self.parts:
            own, left = left[: len(part.streams(None))], left[len(part.streams(None)) :]
            value = part.emit(unpacker, own, view, dtype)
            result = value if result is None else unpacker.node("Add", [result, value])
        assert result is not None
        return result


@dataclass(frozen=True, eq=False)
class Masked(Encoded):
    """Only what is not zero, and a bit for each element that says where it is.

    Attributes:
        mask: (rows, columns).
        values: those where the mask is true, row by row: (n,) in the type that they are stored in.
        indices: (n,) uint8 into the values, where they are a codebook; None where there is a value for each.
    """

    mask: NDArray[np.bool_]
    values: Values
    indices: NDArray[np.uint8] | None = None

    @property
    def constants(self) -> tuple[Values, ...]:
        """The values."""
        return (self.values,)

    def decoded(self) -> NDArray[np.float64]:
        """The matrix (rows, columns)."""
        matrix = np.zeros(self.mask.shape)
        matrix[self.mask] = self.values if self.indices is None else self.values[self.indices]
        return matrix

    def streams(self, view: View | None) -> list[Stream]:
        """The mask and the indices, in the tensor's own order."""
        mask = self.mask if view is None else view.tensor(self.mask)
        found = [Stream(mask.ravel().astype(np.uint8), 2)]
        if self.indices is not None:
            found.append(Stream(self._in_order(self.indices, view), len(self.values)))
        return found

    def _in_order(self, values: Values, view: View | None) -> Values:
        """What belongs to each element that is there, in the tensor's own order."""
        if view is None:
            return values
        wide = np.zeros(self.mask.shape, values.dtype)
        wide[self.mask] = values
        return np.asarray(view.tensor(wide)[view.tensor(self.mask)])

    def emit(self, unpacker: Unpacker, integers: Sequence[ir.Value], view: View, dtype: ir.DataType) -> ir.Value:
        """Number what is there, and gather; number 0 is zero."""
        mask, *indices = integers
        zero = np.zeros(1, self.values.dtype)
        if indices:
            values = unpacker.node("Gather", [unpacker.constant(self.values, "values"), indices[0]])
            table = unpacker.node("Concat", [unpacker.constant(zero, "zero"), values], axis=0)
        else:
            table = unpacker.constant(np.concatenate([zero, self._in_order(self.values, view)]), "values")
        numbers = unpacker.node("CumSum", [mask, unpacker.constant(np.int32(0), "n")])
        numbers = unpacker.node("Mul", [numbers, mask])
        return unpacker.cast(unpacker.node("Gather", [table, unpacker.reshaped(numbers, view.shape)]), dtype)


@dataclass(frozen=True, eq=False)
class Hashed(Encoded):
    """Values shared by chance: which one a weight has, and its sign, are hashes of its place (Chen et al. 2015).

    Attributes:
        shape: of the matrix.
        values: (buckets,) in the type that they are stored in.
        factors: of the polynomial that is the hash; what it gives is bucket * 2 + sign.
    """

    shape: tuple[int, int]
    values: Values
    factors: tuple[int, ...]

    @property
    def constants(self) -> tuple[Values, ...]:
        """The values."""
        return (self.values,)

    def decoded(self) -> NDArray[np.float64]:
        """The matrix (rows, columns)."""
        buckets, signs = places(self.shape, len(self.values), self.factors)
        return self.values.astype(np.float64)[buckets] * signs

    def streams(self, view: View | None) -> list[Stream]:
        """None: nothing but the values is stored."""
        return []

    def emit(self, unpacker: Unpacker, integers: Sequence[ir.Value], view: View, dtype: ir.DataType) -> ir.Value:
        """Compute the hashes, and gather from values and their negatives."""
        rows, columns = self.shape
        column = unpacker.constant(self.values.astype(np.float32)[:, None], "values")
        both = unpacker.node("Concat", [column, unpacker.node("Neg", [column])], axis=1)
        number = unpacker.hashed(self.factors, rows * columns)
        number = unpacker.node("Mod", [number, unpacker.integers([2 * len(self.values)])])
        return viewed(unpacker, unpacker.node("Gather", [unpacker.reshaped(both, [-1]), number]), view, dtype)


def places(
    shape: tuple[int, int], buckets: int, factors: Sequence[int]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """(rows, columns) the bucket and the sign, 1 or -1, of each weight of a hashed matrix."""
    numbers = hashes(factors, shape[0] * shape[1]) % (2 * buckets)
    return (numbers // 2).reshape(shape), np.where(numbers % 2, -1.0, 1.0).reshape(shape)


def viewed(unpacker: Unpacker, value: ir.Value, view: View, dtype: ir.DataType) -> ir.Value:
    """The tensor of a matrix."""
    if view.order != tuple(range(len(view.order))):
        value = unpacker.reshaped(value, [view.split[axis] for axis in view.order])
        value = unpacker.node("Transpose", [value], perm=[int(axis) for axis in np.argsort(view.order)])
    return unpacker.cast(unpacker.reshaped(value, view.shape), dtype)
