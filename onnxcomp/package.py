"""Packages: a model and its external data in one entropy-coded file, and back, byte for byte.

The last stage of Deep Compression (Han et al. 2016, section 4). docs/package.md documents the format. A file is cut at
the contents of its tensors; each piece is coded in the way that makes it smallest: as it is, by zstandard, by planes
(the first bytes of all floats, then the second, ...), or with integers of 5, 6 or 7 bits taken apart, so that bytes
begin where integers do and the coder's statistics are theirs.
"""

import hashlib
import json
import os
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

import numpy as np
import onnx
import zstandard
from numpy.typing import NDArray

from onnxcomp import model as models
from onnxcomp.errors import ModelError
from onnxcomp.files import check_target, replacing
from onnxcomp.numerics.pack import pack as pack_bits
from onnxcomp.numerics.pack import unpack as unpack_bits
from onnxcomp.protos import external_locations
from onnxcomp.report import Document

MAGIC = b"ONNXPACK"
VERSION = 1
SUFFIX = ".onnxpack"

_HEAD = struct.Struct("<8sHQ")  # magic, version, bytes of the contents
_DIGEST = 32
_LEAST = 64
"""Bytes of a tensor that are a piece of their own."""
_PIECE = 1 << 24
"""Bytes of a piece, at most."""
_MOST_CONTENTS = 1 << 28
_WIDTHS = (2, 4, 8)
"""Bytes of elements whose planes are tried."""
_ODD = (5, 6, 7)
"""Bits of integers that do not begin where bytes do; 6 are also two of 3."""
_CODINGS = {"raw", "zstd", *(f"planes:{width}" for width in _WIDTHS), *(f"integers:{bits}" for bits in _ODD)}
_MOST = 1 << 36
"""Bytes that a package may unpack to, unless the caller says otherwise: 64 GiB."""


@dataclass(frozen=True)
class Packed(Document):
    """What packing or unpacking did.

    Attributes:
        package: path of the package.
        size: of the package, in bytes.
        files: the model and its external data, with their bytes.
    """

    kind: ClassVar[str] = "package"

    package: str
    size: int
    files: Mapping[str, int]


def pack(model: str | os.PathLike[str], output: str | os.PathLike[str], *, overwrite: bool = False) -> Packed:
    """Write a package of a model's file and its external data.

    Args:
        model: path of the model.
        output: path of the package.
        overwrite: replace an existing package.

    Raises:
        ModelError: the model cannot be read, or the package not be written.
    """
    source, target = Path(model), Path(output)
    check_target(target, overwrite=overwrite, inputs=(source,))
    models.load(source)  # refuses what is broken, missing or outside the folder
    content = source.read_bytes()
    proto = onnx.load_from_string(content)
    pieces: list[bytes] = []
    files = [_file(source.name, _cut(content, proto), pieces)]
    for location in dict.fromkeys(external_locations(proto, str(source))):
        data = (source.parent / location).read_bytes()
        files.append(_file(location, [data[at : at + _PIECE] for at in range(0, len(data), _PIECE)], pieces))
    contents = zstandard.compress(json.dumps(files).encode(), 19)
    body = b"".join([_HEAD.pack(MAGIC, VERSION, len(contents)), contents, *pieces])
    with replacing(target) as temporary:
        temporary.write_bytes(body + hashlib.sha256(body).digest())
    return Packed(str(target), target.stat().st_size, {file["name"]: file["bytes"] for file in files})


def unpack(
    package: str | os.PathLike[str], output: str | os.PathLike[str], *, overwrite: bool = False, most: int = _MOST
) -> Packed:
    """Write the model of a package, with its external data beside it, as they were.

    Args:
        package: path of the package.
        output: path of the model; external data keep their names.
        overwrite: replace existing files.
        most: bytes to unpack at most.

    Raises:
        ModelError: the package is damaged or hostile, or the files cannot be written.
    """
    source, target = Path(package), Path(output)
    check_target(target, overwrite=overwrite, inputs=(source,))
    try:
        body = source.read_bytes()
    except OSError as error:
        raise ModelError(f"cannot read '{source}': {error.strerror}") from error
    files, pieces = _opened(body, str(source), most)
    targets = [target, *(target.parent / file.name for file in files[1:])]
    for other, file in zip(targets[1:], files[1:], strict=True):
        _check_name(file.name, target, str(source))
        check_target(other, overwrite=overwrite, inputs=(source,))
    written = {}
    for place, file in [*zip(targets, files, strict=True)][::-1]:  # data before the model that needs them
        with replacing(place) as temporary, temporary.open("wb") as stream:
            digest = hashlib.sha256()
            for coding, size, stored in file.pieces:
                piece = _decoded(coding, size, pieces[stored], str(source))
                digest.update(piece)
                stream.write(piece)
            if digest.hexdigest() != file.digest:
                raise _damaged(str(source), f"the checksum of '{file.name}' does not match")
        written[place.name] = file.size
    return Packed(str(source), len(body), written)


# -- contents ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _File:
    """A file as the contents describe it: coding, size and place in the package of each piece."""

    name: str
    size: int
    digest: str
    pieces: tuple[tuple[str, int, slice], ...]


def _file(name: str, parts: Sequence[bytes], pieces: list[bytes]) -> dict[str, Any]:
    """The description of a file, whose coded pieces are added to the others."""
    described = []
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
        coding, stored = _coded(part)
        pieces.append(stored)
        described.append([coding, len(part), len(stored)])
    return {"name": name, "bytes": sum(map(len, parts)), "sha256": digest.hexdigest(), "pieces": described}


def _opened(body: bytes, name: str, most: int) -> tuple[list[_File], bytes]:
    """The files of a package that is whole, and what their pieces are slices of."""
    if body[: len(MAGIC)] != MAGIC:
        raise ModelError(f"'{name}' is no package", "another kind of file", "give a file that `onnxcomp pack` wrote")
    if len(body) < _HEAD.size + _DIGEST:
        raise _damaged(name, "it is cut off")
    _, version, length = _HEAD.unpack_from(body)
    if version != VERSION:
        raise ModelError(
            f"'{name}' has version {version} of the format, this is version {VERSION}",
            "it was written by another version of onnxcomp",
            "unpack it with that one",
        )
    if hashlib.sha256(body[:-_DIGEST]).digest() != body[-_DIGEST:]:
        raise _damaged(name, "its checksum does not match")
    start = _HEAD.size + length
    try:
        text = _inflated(body[_HEAD.size : start], _MOST_CONTENTS)
        files, at = [], 0
        for entry in json.loads(text):
            found = []
            for coding, size, stored in entry["pieces"]:
                if coding not in _CODINGS or type(size) is not int or type(stored) is not int or min(size, stored) < 0:
                    raise ValueError("a piece is not described")
                found.append((coding, size, slice(start + at, start + at + stored)))
                at += stored
            files.append(_File(str(entry["name"]), sum(size for _, size, _ in found), entry["sha256"], tuple(found)))
    except (ValueError, KeyError, TypeError, zstandard.ZstdError) as error:
        raise _damaged(name, "its contents cannot be read") from error
    if not files or start + at != len(body) - _DIGEST:
        raise _damaged(name, "its pieces do not fill it")
    if (total := sum(file.size for file in files)) > most:
        raise ModelError(
            f"'{name}' would unpack to {total} bytes, more than the {most} allowed",
            "a very large model, or a hostile file",
        )
    return files, body


def _check_name(name: str, target: Path, package: str) -> None:
    """External data stay in the model's folder."""
    path = PurePosixPath(name)
    strange = "\\" in name or ":" in name or "\0" in name
    folder = target.parent.resolve()
    inside = (folder / name).resolve().is_relative_to(folder) if not strange else False
    if strange or not name or path.is_absolute() or ".." in path.parts or not inside:
        raise ModelError(f"'{package}' wants to write '{name}', outside the model's folder", "a hostile file")


def _damaged(name: str, what: str) -> ModelError:
    return ModelError(f"'{name}' is damaged: {what}", "an incomplete copy, or changed bytes", "copy it again")


# -- codings ----------------------------------------------------------------------------------------------------------


def _cut(content: bytes, proto: onnx.ModelProto) -> list[bytes]:
    """A model's bytes, cut where the contents of larger tensors begin and end."""
    edges, at = [0], 0
    for tensor in proto.graph.initializer:
        if len(tensor.raw_data) >= _LEAST and (place := content.find(tensor.raw_data, at)) >= 0:
            at = place + len(tensor.raw_data)
            edges += [place, *range(place + _PIECE, at, _PIECE), at]
    edges.append(len(content))
    return [content[start:stop] for start, stop in pairwise(edges)]


def _coded(part: bytes) -> tuple[str, bytes]:
    """The smallest coding of a piece."""
    compressor = zstandard.ZstdCompressor(level=19 if len(part) < 1 << 22 else 9, write_content_size=True)
    found = [("raw", part), ("zstd", compressor.compress(part))]
    array = np.frombuffer(part, np.uint8)
    if len(part) < _LEAST:
        return min(found, key=lambda coding: len(coding[1]))
    for width in _WIDTHS:
        if len(part) % width == 0:
            found.append((f"planes:{width}", compressor.compress(array.reshape(-1, width).T.tobytes())))
    for bits in _ODD:
        found.append((f"integers:{bits}", compressor.compress(_apart(array, bits).tobytes())))
    return min(found, key=lambda coding: len(coding[1]))


def _apart(array: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Integers of so many bits in bytes of their own, then what is left over."""
    integers = np.asarray(unpack_bits(array, bits, len(array) * 8 // bits, signed=False), np.uint8)
    left = np.unpackbits(array, bitorder="little")[len(integers) * bits :]
    return np.concatenate([integers, np.packbits(left, bitorder="little")])


def _together(data: NDArray[np.uint8], bits: int, size: int) -> NDArray[np.uint8]:
    """The inverse of `_apart`, for so many bytes."""
    count, spare = divmod(size * 8, bits)
    integers, tail = data[:count], data[count:]
    if len(integers) != count or len(tail) != -(-spare // 8):
        raise ValueError("a piece has another size")
    singles = np.unpackbits(pack_bits(integers, bits), bitorder="little", count=count * bits)
    return np.packbits(
        np.concatenate([singles, np.unpackbits(tail, bitorder="little", count=spare)]), bitorder="little"
    )


def _decoded(coding: str, size: int, stored: bytes, name: str) -> bytes:
    """A piece as it was."""
    kind, _, parameter = coding.partition(":")
    try:
        if kind == "raw":
            piece = stored
        else:
            room = size * 2 + _LEAST  # integers of 5 bits take 8
            data = np.frombuffer(_inflated(stored, room), np.uint8)
            codings: dict[str, Callable[[], NDArray[np.uint8]]] = {
                "zstd": lambda: data,
                "planes": lambda: data.reshape(int(parameter), -1).T,
                "integers": lambda: _together(data, int(parameter), size),
            }
            piece = codings[kind]().tobytes()
    except (ValueError, zstandard.ZstdError) as error:
        raise _damaged(name, f"a piece coded as '{coding}' cannot be read") from error
    if len(piece) != size:
        raise _damaged(name, "a piece has another size than it should")
    return piece


def _inflated(data: bytes, most: int) -> bytes:
    """What zstandard compressed, if that is no longer than it may be."""
    size = zstandard.frame_content_size(data)
    if not 0 <= size <= most:
        raise ValueError("a piece has no length, or one out of bounds")
    return zstandard.ZstdDecompressor().decompress(data, max_output_size=size)
