"""NumPy's .npz files read in slices and written without pickling."""

import shutil
import struct
import tempfile
import threading
import weakref
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO, Any, Protocol

import google.protobuf.message
import numpy as np
from numpy.typing import NDArray

from onnxcomp.errors import DataError

_one_at_a_time = threading.Lock()
"""Headers are parsed as Python. Threads that both do that while garbage is collected get a SystemError from Python 3.11
("AST constructor recursion depth mismatch")."""


class Column(Protocol):
    """What is needed of an array along the samples: an ndarray, or a part of a file that looks like one."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Samples first."""

    def __getitem__(self, rows: slice, /) -> NDArray[Any]: ...
    def __array__(self) -> NDArray[Any]: ...


class Scratch:
    """A temporary folder that goes when nobody holds it any more."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="onnxcomp-"))
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)


@dataclass(frozen=True)
class _FileColumn:
    """An array inside a file, of which only the rows asked for are read.

    Not `numpy.memmap`: pages of a mapped file count as the process's own memory until the system is short of it.
    """

    path: Path
    offset: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    scratch: Scratch | None

    def __getitem__(self, rows: slice, /) -> NDArray[Any]:
        start, stop, _ = rows.indices(self.shape[0])
        return self._read(start * prod(self.shape[1:]), (stop - start, *self.shape[1:]))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return self._read(0, self.shape)

    def _read(self, first: int, shape: tuple[int, ...]) -> NDArray[Any]:
        offset = self.offset + first * self.dtype.itemsize
        with reading(self.path):
            return np.fromfile(self.path, self.dtype, prod(shape), offset=offset).reshape(shape)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn whatever a broken file makes the libraries raise into a DataError."""
    try:
        yield
    except (
        OSError,
        ValueError,
        EOFError,
        RuntimeError,  # an encrypted member
        zipfile.BadZipFile,
        zlib.error,
        google.protobuf.message.DecodeError,
    ) as error:
        raise DataError(
            f"cannot read {path}: {error}",
            "it is cut short, is not what its name says, or holds pickled Python objects, which could run code",
            "write the file again, from plain arrays if it is one of NumPy's",
        ) from error


def npz_columns(path: Path) -> dict[str, Column]:
    """The arrays in an .npz, read when they are asked for.

    Members stored uncompressed are read in place. Compressed ones cannot be read in slices: they are decompressed
    once into a temporary folder, which goes when the columns do.

    Raises:
        DataError: the file cannot be read, or holds pickled objects.
    """
    columns: dict[str, Column] = {}
    scratch = Scratch()
    with reading(path), zipfile.ZipFile(path) as archive:
        for number, member in enumerate(archive.infolist()):
            name = member.filename.removesuffix(".npy")
            if name == member.filename:
                continue
            if member.compress_type == zipfile.ZIP_STORED:
                columns[name] = npy_column(path, _data_offset(path, member))
                continue
            unpacked = scratch.path / f"{number}.npy"  # never the member's own name, which may point anywhere
            with archive.open(member) as source, unpacked.open("wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
            columns[name] = npy_column(unpacked, scratch=scratch)
    return columns


def npy_column(path: Path, offset: int = 0, scratch: Scratch | None = None) -> Column:
    """The array whose .npy header is at `offset` bytes of a file; it keeps `scratch` alive.

    Raises:
        ValueError: there is no such header, or it announces pickled objects.
        OSError: the file cannot be read.
    """
    with path.open("rb") as stream, _one_at_a_time:
        stream.seek(offset)
        version = np.lib.format.read_magic(stream)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran_order, dtype = read_header(stream)
        start = stream.tell()
    if dtype.hasobject:
        raise ValueError("it holds pickled Python objects")
    if start + prod(shape) * dtype.itemsize > path.stat().st_size:
        raise ValueError("it ends before its data do")
    if fortran_order and len(shape) > 1:
        # A sample's values lie all over the file, so this rare order is read whole.
        flat = np.fromfile(path, dtype, prod(shape), offset=start)
        return flat.reshape(shape, order="F")
    return _FileColumn(path, start, dtype, shape, scratch)


def _data_offset(path: Path, member: zipfile.ZipInfo) -> int:
    """Where a stored member's bytes begin.

    That is after 30 bytes of local header and the name and extra field whose lengths it ends with (APPNOTE 4.3.7);
    the central directory's copies of them may have other lengths.
    """
    if member.flag_bits & 1:
        raise ValueError(f"{member.filename} is encrypted")
    with path.open("rb") as stream:
        stream.seek(member.header_offset + 26)
        name_length, extra_length = struct.unpack("<HH", stream.read(4))
    return int(member.header_offset + 30 + name_length + extra_length)


def write_npz(path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Like `numpy.savez`, which does not take every name as a keyword.

    Raises:
        ValueError: an array holds Python objects.
    """
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as stream:
                np.lib.format.write_array(stream, array, allow_pickle=False)


def load_npz(path: Path) -> dict[str, NDArray[Any]]:
    """All arrays of an .npz.

    Raises:
        DataError: the file cannot be read, or holds pickled objects.
    """
    with reading(path), zipfile.ZipFile(path) as archive:
        members = [name for name in archive.namelist() if name.endswith(".npy")]
        return {name.removesuffix(".npy"): _load_npy(archive.open(name)) for name in members}


def load_npy(path: Path) -> NDArray[Any]:
    """The array of an .npy.

    Raises:
        DataError: the file cannot be read, or holds pickled objects.
    """
    with reading(path):
        return _load_npy(path.open("rb"))


def _load_npy(stream: IO[bytes]) -> NDArray[Any]:
    with stream, _one_at_a_time:
        return np.lib.format.read_array(stream, allow_pickle=False)
