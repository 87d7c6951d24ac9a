import ml_dtypes
import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxcomp.errors import OptionError
from onnxcomp.numerics.pack import pack, unpack


@given(st.integers(1, 8), st.booleans(), st.integers(0, 3), st.integers(0, 25), st.integers(0, 1000))
def test_unpack_inverts_pack(bits: int, signed: bool, rows: int, count: int, seed: int) -> None:
    low = -(1 << bits - 1) if signed else 0
    dtype = np.int8 if signed else np.uint8
    integers = np.random.default_rng(seed).integers(low, low + (1 << bits), (2, rows, count)).astype(dtype)
    packed = pack(integers, bits)
    assert packed.dtype == np.uint8
    assert packed.shape == (2, rows, -(-count * bits // 8))
    result = unpack(packed, bits, count, signed=signed)
    assert result.dtype == dtype
    np.testing.assert_array_equal(result, integers)


def test_three_bits_cross_bytes_without_gaps() -> None:
    # 001 010 011 100 101 110 111 000, lowest bits first.
    packed = pack(np.array([1, 2, 3, 4, 5, 6, 7, 0], np.uint8), 3)
    assert int.from_bytes(packed.tobytes(), "little") == sum(v << 3 * i for i, v in enumerate([1, 2, 3, 4, 5, 6, 7, 0]))


@pytest.mark.parametrize("signed", [True, False])
def test_four_bits_are_onnx_layout(signed: bool) -> None:
    integers = np.arange(-7, 8, dtype=np.int8) if signed else np.arange(15, dtype=np.uint8)
    tensor = onnx.numpy_helper.from_array(integers.astype(ml_dtypes.int4 if signed else ml_dtypes.uint4))
    assert pack(integers, 4).tobytes() == tensor.raw_data


def test_wider_integers_keep_their_low_bits() -> None:
    np.testing.assert_array_equal(pack(np.array([-1, 5], np.int32), 4), [0x5F])


@pytest.mark.parametrize("bits", [0, 9])
def test_other_widths_are_refused(bits: int) -> None:
    with pytest.raises(OptionError, match=f"{bits} bits"):
        pack(np.zeros(2, np.uint8), bits)
    with pytest.raises(OptionError, match=f"{bits} bits"):
        unpack(np.zeros(2, np.uint8), bits, 2, signed=False)
