"""Slices of .npz members, and files that are broken or hostile."""

import io
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnxcomp.errors import DataError
from onnxcomp.npz import load_npy, load_npz, npz_columns, write_npz

ARRAYS: dict[str, Any] = {
    "x": np.arange(24, dtype=np.float32).reshape(4, 3, 2),
    "swapped": np.arange(4, dtype=">i8"),
    "text": np.array(["a", "ß", "ccc", ""]),
    "fortran": np.asfortranarray(np.arange(8).reshape(4, 2)),
    "scalar": np.array(7.5),
    "empty": np.zeros((0, 3)),
    "folder/name:0": np.arange(4),
}


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed, lambda path, **arrays: write_npz(path, arrays)])
def test_columns_are_the_arrays(tmp_path: Path, save: Any) -> None:
    save(tmp_path / "a.npz", **ARRAYS)
    columns = npz_columns(tmp_path / "a.npz")
    assert columns.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert np.asarray(columns[name]).dtype == array.dtype
        assert np.array_equal(np.asarray(columns[name]), array)
        if array.ndim:
            assert np.array_equal(columns[name][1:3], array[1:3])
    loaded = load_npz(tmp_path / "a.npz")
    assert all(np.array_equal(loaded[name], array) for name, array in ARRAYS.items())


def test_decompressed_members_go_with_their_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez_compressed(tmp_path / "a.npz", x=np.arange(4))
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    column = npz_columns(tmp_path / "a.npz")["x"]
    assert len(list((tmp_path / "scratch").rglob("*.npy"))) == 1
    del column
    assert not list((tmp_path / "scratch").iterdir())


def broken(kind: str) -> bytes:
    stream = io.BytesIO()
    if kind == "objects":
        np.savez(stream, x=np.array([{}], object))
    elif kind == "packed objects":
        np.savez_compressed(stream, x=np.array([{}], object))
    elif kind == "bad header":
        with zipfile.ZipFile(stream, "w") as archive:
            archive.writestr("x.npy", b"not an array")
    elif kind == "bad checksum":
        np.savez_compressed(stream, x=np.arange(1000))
        damaged = bytearray(stream.getvalue())
        damaged[len(damaged) // 2] ^= 0xFF
        return bytes(damaged)
    else:
        np.savez(stream, x=np.arange(1000))
    data = stream.getvalue()
    return {"cut": data[: len(data) // 2], "text": b"hello", "empty": b""}.get(kind, data)


@pytest.mark.parametrize("kind", ["cut", "text", "empty", "objects", "packed objects", "bad header", "bad checksum"])
def test_broken_files_are_named(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "broken.npz"
    path.write_bytes(broken(kind))
    for read in (npz_columns, load_npz, load_npy):
        with pytest.raises(DataError, match=r"cannot read .*broken\.npz"):
            read(path)


def test_an_array_shorter_than_its_header_says(tmp_path: Path) -> None:
    stream = io.BytesIO()
    np.save(stream, np.arange(1000))
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("x.npy", stream.getvalue()[:200])
    with pytest.raises(DataError, match="ends before its data"):
        npz_columns(tmp_path / "a.npz")


def test_objects_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="allow_pickle"):
        write_npz(tmp_path / "a.npz", {"x": np.array([{}], object)})


def test_threads_parse_one_header_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez(tmp_path / "a.npz", x=np.zeros(3), y=np.ones(3))
    read, inside, most = np.lib.format.read_array, [0], [0]

    def slow(stream: Any, **options: Any) -> Any:
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        time.sleep(0.02)
        inside[0] -= 1
        return read(stream, **options)

    monkeypatch.setattr(np.lib.format, "read_array", slow)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(load_npz, [tmp_path / "a.npz"] * 4))
    assert [each["y"].sum() for each in found] == [3.0] * 4
    assert most == [1]
