"""Integers packed in a graph, and the plain operators that unpack them.

ONNX Runtime folds all of these when it loads a model: BitShift, Cast, Gather, Mul, Add, Div, Mod, Reshape, Slice,
Split, Range, each from opset 13 at the latest. Integers of all weights are unpacked together, so that each weight costs
few nodes.

A stream of integers below a base is stored in as many bits as the base needs, one after another, lowest bit first; or,
where that is less, as digits of bytes to that base: five of three values, three of five or six.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import ArrayLike, DTypeLike, NDArray

from onnxcomp.graph import Builder
from onnxcomp.numerics.pack import pack

_POOL = 1 << 22
"""Integers that are unpacked at a time, for each of which a session takes some 20 bytes while it loads."""

PRIME = (1 << 31) - 1
"""The modulus of hashes, so that products stay below 2^63."""


@dataclass(frozen=True, eq=False)
class Stream:
    """Integers to be stored.

    Attributes:
        integers: (n,) uint8, below the base.
        base: how many values there are, 2 to 256.
    """

    integers: NDArray[np.uint8]
    base: int

    @property
    def bytes(self) -> int:
        """What they take."""
        return packed_bytes(len(self.integers), self.base)


def packed_bytes(count: int, base: int) -> int:
    """Bytes that so many integers below a base take."""
    return -(-count // _digits(base)) if _digits(base) else -(-count * _bits(base) // 8)


class Unpacker:
    """The nodes of one graph that unpack integers, put before its first node.

    Args:
        builder: of the graph.
        before: the node that new ones go before.
    """

    def __init__(self, builder: Builder, before: ir.Node) -> None:
        self._builder, self._before = builder, before
        self._constants: dict[tuple[str, bytes], ir.Value] = {}

    def node(
        self, operator: str, inputs: Sequence[ir.Value], dtype: ir.DataType | None = None, name: str = "", **rest: Any
    ) -> ir.Value:
        """A node; its output has the type of its first input unless another is given."""
        return self._builder.node(
            operator, inputs, name or operator.lower(), dtype=dtype or inputs[0].dtype, before=self._before, **rest
        )

    def constant(self, array: ArrayLike, name: str) -> ir.Value:
        """A constant; small ones are shared."""
        content = np.asarray(array)
        key = (f"{content.dtype} {content.shape}", content.tobytes() if content.size < 64 else b"")
        if content.size >= 64 or key not in self._constants:
            self._constants[key] = self._builder.constant(content, name)
        return self._constants[key]

    def integers(self, elements: Sequence[int] | NDArray[np.int64], dtype: DTypeLike = np.int64) -> ir.Value:
        """A vector of integers."""
        return self.constant(np.asarray(elements, dtype), "n")

    def reshaped(self, value: ir.Value, shape: Sequence[int]) -> ir.Value:
        """The same elements in another shape."""
        return self.node("Reshape", [value, self.integers(shape)])

    def cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """The same elements in another type."""
        return value if value.dtype == dtype else self.node("Cast", [value], dtype, to=dtype)

    # -- streams ----------------------------------------------------------------------------------------------------

    def unpacked(self, streams: Sequence[Stream]) -> list[ir.Value]:
        """Each stream as a vector of int32."""
        result: dict[int, ir.Value] = {}
        pools: dict[int, list[list[int]]] = {}
        sizes: dict[int, int] = {}
        for number, stream in enumerate(streams):
            base = stream.base if _digits(stream.base) else 1 << _bits(stream.base)
            size = sizes.get(base, 0) + len(stream.integers)
            if base not in sizes or size > _POOL:
                pools.setdefault(base, []).append([])
                size = len(stream.integers)
            pools[base][-1].append(number)
            sizes[base] = size
        for base, groups in pools.items():
            for pool in groups:
                whole = np.concatenate([streams[number].integers for number in pool])
                value = self._digits(whole, base) if _digits(base) else self._bits(whole, base)
                result |= zip(pool, self._split(value, [len(streams[n].integers) for n in pool]), strict=True)
        return [result[number] for number in range(len(streams))]

    def _split(self, value: ir.Value, sizes: Sequence[int]) -> list[ir.Value]:
        if len(sizes) == 1:
            return [value]
        first = self.node("Split", [value, self.integers(sizes)], axis=0, outputs=len(sizes))
        node = first.producer()
        assert node is not None
        for output in node.outputs:
            output.type = value.type
        return list(node.outputs)

    def _digits(self, integers: NDArray[np.uint8], base: int) -> ir.Value:
        places = base ** np.arange(_digits(base))
        filled = np.zeros(-(-len(integers) // len(places)) * len(places), np.int64)
        filled[: len(integers)] = integers
        data = self.constant((filled.reshape(-1, len(places)) @ places).astype(np.uint8)[:, None], f"digits{base}")
        value = self.node("Div", [self.cast(data, ir.DataType.INT32), self.integers(places, np.int32)])
        value = self.node("Mod", [value, self.integers([base], np.int32)])
        return self._cut(value, len(integers), len(filled))

    def _bits(self, integers: NDArray[np.uint8], base: int) -> ir.Value:
        bits = _bits(base)
        together = math.lcm(bits, 8) // bits
        filled = np.zeros(-(-len(integers) // together) * together, np.uint8)
        filled[: len(integers)] = integers
        starts = np.arange(together) * bits
        content = pack(filled.reshape(-1, together), bits)
        data = value = self.constant(content, f"packed{bits}")
        width = 8
        if content.shape[1] > 1:  # an integer may lie in two bytes
            ends = np.minimum(starts // 8 + 1, content.shape[1] - 1)
            value = self.node("Gather", [data, self.integers(starts // 8, np.int32)], axis=1)
            high = self.node("Gather", [data, self.integers(ends, np.int32)], axis=1)
            high = self.node("Mul", [self.cast(high, ir.DataType.INT32), self.integers([256], np.int32)])
            value = self.node("Add", [self.cast(value, ir.DataType.INT32), high])
            value, width = self.cast(value, ir.DataType.UINT32), 32
        if bits < 8:  # shifting left drops what is above, shifting right what is below
            kind = f"uint{width}"
            up, down = self.integers(width - bits - starts % 8, kind), self.integers([width - bits], kind)
            value = self.node("BitShift", [value, up], direction="LEFT")
            value = self.node("BitShift", [value, down], direction="RIGHT")
        return self._cut(self.cast(value, ir.DataType.INT32), len(integers), len(filled))

    def _cut(self, value: ir.Value, count: int, stored: int) -> ir.Value:
        value = self.reshaped(value, [-1])
        return value if count == stored else self.node("Slice", [value, *(self.integers([n]) for n in (0, count))])

    # -- hashes -----------------------------------------------------------------------------------------------------

    def hashed(self, factors: Sequence[int], count: int) -> ir.Value:
        """(count,) int64: (a i^2 + b i + c) mod PRIME for the numbers i from 0 on."""
        ends = [self.constant(np.int64(end), "n") for end in (0, count, 1)]
        numbers = self.node("Range", ends, ir.DataType.INT64)
        prime = self.integers([PRIME])
        value = self.integers([factors[0]])
        for factor in factors[1:]:  # Horner's rule
            value = self.node("Mod", [self.node("Mul", [value, numbers]), prime])
            value = self.node("Mod", [self.node("Add", [value, self.integers([factor])]), prime])
        return value


def hashes(factors: Sequence[int], count: int) -> NDArray[np.int64]:
    """What `Unpacker.hashed` computes."""
    numbers = np.arange(count, dtype=np.int64)
    value = np.full(count, factors[0], np.int64)
    for factor in factors[1:]:
        value = (value * numbers % PRIME + factor) % PRIME
    return value


def _bits(base: int) -> int:
    return max((base - 1).bit_length(), 1)


def _digits(base: int) -> int:
    """Digits to the base in a byte, where that is better than bits; else 0."""
    count = int(math.log(256.5, base))
    return count if count * _bits(base) > 8 else 0
