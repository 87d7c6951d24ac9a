"""Integers of 1 to 8 bits, packed without gaps; for 4 and 2 bits the layout of ONNX's INT4, UINT4, INT2 and UINT2."""

import numpy as np
from numpy.typing import NDArray

from onnxcomp.errors import OptionError
from onnxcomp.numerics.arrays import Ints


def pack(integers: Ints, bits: int) -> NDArray[np.uint8]:
    """Packs along the last axis, lowest bit first: the first integer sits in the low bits of the first byte.

    Args:
        integers: (..., n) signed (two's complement) or unsigned; of wider ones the low bits are kept.
        bits: bits per integer, 1 to 8.

    Returns:
        (..., ceil(n * bits / 8)) bytes, the unused bits zero.

    Raises:
        OptionError: bits out of range.
    """
    _check(bits)
    single = (integers[..., None] >> np.arange(bits, dtype=integers.dtype)) & 1
    return np.packbits(
        single.astype(np.uint8).reshape(*integers.shape[:-1], integers.shape[-1] * bits), axis=-1, bitorder="little"
    )


def unpack(packed: NDArray[np.uint8], bits: int, count: int, *, signed: bool) -> Ints:
    """The inverse of `pack`.

    Args:
        packed: (..., ceil(count * bits / 8)) bytes.
        bits: bits per integer, 1 to 8.
        count: integers along the last axis.
        signed: read two's complement.

    Returns:
        (..., count) int8 or uint8.

    Raises:
        OptionError: bits out of range.
    """
    _check(bits)
    single = np.unpackbits(packed, axis=-1, count=count * bits, bitorder="little")
    powers = 1 << np.arange(bits)
    if signed:
        powers[-1] *= -1
    # Sums modulo 256 are all that is needed, in an eighth of the memory that int64 would take.
    integers = single.reshape(*packed.shape[:-1], count, bits) @ powers.astype(np.uint8)
    return integers.view(np.int8) if signed else integers


def _check(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise OptionError(f"cannot pack integers of {bits} bits", remedy="choose 1 to 8 bits")
