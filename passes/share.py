"""Weight sharing: many weights have one value, and the file holds which.

    W'[r, c] = values[index[r, c]]

1. `kmeans`: single values, found with the layer's inputs in view (`numerics.codebook`).
2. `product`: vectors of neighbouring weights of a row (`numerics.product`).
3. `hash`: the index is a hash of the weight's place, computed in the graph; only the values are stored, and fitted by
   least squares.

Sharing makes the file smaller, not the model faster: a session decodes the weights once, when it loads.
"""

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, TypeAlias

import numpy as np
import onnx_ir as ir

from onnxcomp.compression import Encode, Matrix, by_part, compress, options, sparse
from onnxcomp.constants import Weight
from onnxcomp.core import Choice, Context, Option, Outcome, Pass
from onnxcomp.encodings import Codes, Encoded, Hashed, Masked, Values, places
from onnxcomp.errors import OptionError
from onnxcomp.numerics.codebook import Codebook, fitted, kmeans, share
from onnxcomp.numerics.product import plain_vectors, share_vectors
from onnxcomp.settings import within
from onnxcomp.unpacking import PRIME

_INDEX = 8
"""Bits of an index, at most."""

Bits: TypeAlias = Annotated[int, within(1, _INDEX)]


class Method(Choice):
    """What is shared, and who with."""

    KMEANS = "kmeans"
    """Single values, by a codebook."""
    PRODUCT = "product"
    """Vectors of neighbouring weights, by a codebook."""
    HASH = "hash"
    """Single values, by chance."""


@dataclass(frozen=True)
class Share(Pass):
    """Weights that share values.

    Attributes:
        bits: per weight, 1 to 8, beside the codebooks.
        method: what is shared.
        channels: output channels that have a codebook of their own; None for one codebook per tensor.
        reconstruct: fit each layer on what those before it now give, before it is encoded.
        parts: bits by the name of a node; where any is named, no other is treated.

    Raises:
        OptionError: a setting out of range.
    """

    name: ClassVar[str] = "share"
    summary: ClassVar[str] = "weight sharing: codebooks or hashes, decoded when a session loads: smaller, not faster"
    stores: ClassVar[bool] = True
    remark: ClassVar[str] = (
        "Shared weights save bytes in the file on every provider and change neither latency nor memory: "
        "sessions decode them as they load."
    )

    bits: Bits = 4
    method: Method = Method.KMEANS
    channels: Annotated[int, within(1)] | None = None
    reconstruct: bool = True
    parts: tuple[tuple[str, Bits], ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.channels is not None and self.method is not Method.KMEANS:
            raise OptionError(
                "codebooks by channels need the method kmeans", remedy="leave them out", setting=("channels",)
            )

    def drafted(self) -> "Share":  # noqa: D102
        return replace(self, reconstruct=False)

    def apply(self, model: ir.Model, context: Context) -> Outcome:
        """Encode what becomes smaller."""
        encode = self._encode(context.seed, careful=True)
        if self.parts:
            encode = by_part(self._encoder(context.seed, careful=True), self.parts)
        return compress(model, context, encode, self._said, reconstruct=self.reconstruct, integers=self._takes_integers)

    def options(self, model: ir.Model, context: Context) -> Iterator[Option]:
        """Every number of bits, by k-means alone: an upper bound, for the pass assigns with the errors fed back."""
        bits = range(1, _INDEX + 1)
        return options(model, context, bits, self._encoder(context.seed, careful=False), integers=self._takes_integers)

    @property
    def _takes_integers(self) -> bool:
        return self.method is not Method.HASH

    def _encoder(self, seed: int, *, careful: bool) -> Callable[[int], Encode]:
        return lambda bits: replace(self, bits=bits, parts=())._encode(seed, careful=careful)

    def _encode(self, seed: int, *, careful: bool) -> Encode:
        def encode(weight: Weight, matrix: Matrix, H: Matrix) -> Encoded | str:
            match self.method:
                case Method.HASH:
                    return self._hashed(weight, matrix, H, seed)
                case Method.PRODUCT:
                    return self._product(weight, matrix, H, seed, careful=careful)
                case Method.KMEANS:
                    return self._codes(weight, matrix, H, careful=careful)

        return encode

    def _codes(self, weight: Weight, matrix: Matrix, H: Matrix, *, careful: bool) -> Encoded:
        dtype, count = weight.array.dtype, 1 << self.bits

        def found(count: int, books: int = 1, *, zero: bool = False) -> Codebook:
            if careful:
                return share(matrix, H, count, books, zero=zero)
            return kmeans(matrix, np.diagonal(H, axis1=1, axis2=2), count, books, zero=zero)

        if sparse(matrix):
            book = found(count + 1, zero=True)
            (values,) = _stored(book.values, dtype)
            mask = matrix != 0
            others = np.delete(values, np.searchsorted(book.values[0], 0.0))
            places = np.cumsum(book.values[0] != 0) - 1
            zeros = book.values[0][book.indices] == 0
            return Masked(mask & ~zeros, others, places[book.indices[mask & ~zeros]].astype(np.uint8))
        books = 1
        if self.channels is not None and len(matrix) % self.channels == 0:
            books = len(matrix) // self.channels
        book = found(count, books)
        return Codes(book.indices.astype(np.uint8), _stored(book.values, dtype)[:, :, None])

    def _product(self, weight: Weight, matrix: Matrix, H: Matrix, seed: int, *, careful: bool) -> Encoded:
        indices_bytes = matrix.size * self.bits // 8
        length = max(
            (
                size
                for size in range(2, _INDEX // self.bits + 1)
                if matrix.shape[1] % size == 0 and (size << self.bits * size) * weight.array.itemsize <= indices_bytes
            ),
            default=1,
        )
        if length == 1:  # vectors would take more bytes than indices
            return self._codes(weight, matrix, H, careful=careful)
        count = 1 << self.bits * length
        if careful:
            vectors, indices = share_vectors(matrix, H, count, length, seed)
        else:
            vectors, indices = plain_vectors(matrix, count, length, seed)
        return Codes(indices.astype(np.uint8), _stored(vectors, weight.array.dtype)[None])

    def _hashed(self, weight: Weight, matrix: Matrix, H: Matrix, seed: int) -> Encoded:
        buckets = max(matrix.size * self.bits // (8 * weight.array.dtype.itemsize), 1)
        own = zlib.crc32((weight.value.name or "").encode())
        factors = tuple(np.random.default_rng([seed, own]).integers(1, PRIME, 3).tolist())
        indices, signs = places(matrix.shape, buckets, factors)
        values = fitted(matrix, H, indices, np.zeros(buckets), signs)
        return Hashed(matrix.shape, _stored(values, weight.array.dtype), factors)

    def _said(self, encoded: Encoded) -> str:
        if isinstance(encoded, Hashed):
            return f"{len(encoded.values)} shared values, by hash"
        if isinstance(encoded, Masked):
            return f"{len(encoded.values)} shared values and zero, {1 - encoded.mask.mean():.0%} zero"
        assert isinstance(encoded, Codes)
        books, count, length = encoded.values.shape
        what = "values" if length == 1 else f"vectors of {length}"
        bits = (count - 1).bit_length() // length
        return f"{count} shared {what}, {bits} bits" + (f", {books} codebooks" if books > 1 else "")


def _stored(values: Matrix, dtype: np.dtype[Any]) -> Values:
    """In the type of the weight: integers stay integers."""
    return (np.rint(values) if dtype.kind in "iu" else values).astype(dtype)
