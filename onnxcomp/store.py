"""What was computed and measured before, on disk by content: work that was cut short goes on where it was.

A key is the hash of all that a result depends on: model contents, settings, data, the target, this package's code, the
versions of Python, ONNX Runtime and other libraries, the processor and how much of it may be used. So nothing is ever
out of date, and nothing has to be told to go. Each entry is a file of its own that appears whole or not at all, and
begins with a checksum; what is damaged, or cannot be read, counts as missing.
"""

import contextlib
import hashlib
import io
import os
import pickle
import platform
import re
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from types import FunctionType
from typing import Any, TypeVar

import numpy as np
import onnx_ir as ir

from onnxcomp import __version__, runtime
from onnxcomp import model as models
from onnxcomp.errors import ModelError, OptionError
from onnxcomp.machine import cores
from onnxcomp.samples import Dataset

LIMIT = 2 * 10**9
"""Bytes that a store may hold; what was not used for longest goes first."""

_LARGEST = 0.25
"""Share of the limit that one entry may take."""
_ABANDONED = 3600.0
"""Seconds after which a file that was never finished is a leftover of a process that is gone."""
_LIBRARIES = ("numpy", "onnx", "onnx-ir", "onnxscript", "scipy")
"""Distributions by whose version numbers and graphs may differ, beside ONNX Runtime, which has several names."""
_CHECKSUM = hashlib.sha256().digest_size
"""Bytes with which an entry begins."""

Found = TypeVar("Found")


class _UnknownError(Exception):
    """Something that no key can stand for: a function of the user's, which may read whatever it likes."""


class Store:
    """A folder of results.

    Args:
        folder: made if missing. Its files are unpickled, so nobody else should be able to write there.
        limit: bytes that it may hold.

    Raises:
        OptionError: the folder cannot be made or written.
    """

    def __init__(self, folder: str | os.PathLike[str], limit: int = LIMIT) -> None:
        self._folder, self._limit = Path(folder), limit
        self._datasets: dict[int, tuple[Dataset, str]] = {}
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._tidy()
        except OSError as error:
            raise OptionError(
                f"the cache '{self._folder}' cannot be used: {error.strerror}",
                remedy="give another --cache, or --no-cache",
            ) from error
        if not os.access(self._folder, os.W_OK):
            raise OptionError(
                f"the cache '{self._folder}' is not writable", remedy="give another --cache, or --no-cache"
            )

    def recall(self, what: str, parts: object, compute: Callable[[], Found]) -> Found:
        """A result found before, or computed now and kept.

        A result that is computed goes through its form on disk too, so that the rest of the work cannot tell.

        Args:
            what: is computed.
            parts: all that it depends on, beside the machine and the code.
            compute: how, where it is not known.
        """
        try:
            path = self._path(what, parts)
        except _UnknownError:
            return compute()
        with contextlib.suppress(Exception):  # whatever an unreadable file raises
            found: Found = pickle.loads(_opened(path))
            os.utime(path)
            return found
        found = compute()
        try:
            data = _pickled(found)
        except (ModelError, pickle.PicklingError):  # beyond what one message holds
            return found
        if len(data) <= self._limit * _LARGEST:
            with contextlib.suppress(OSError):  # a full disk is no reason to stop
                self._write(path, data)
        kept: Found = pickle.loads(data)
        return kept

    def _path(self, what: str, parts: object) -> Path:
        digest = hashlib.sha256()
        for part in (_circumstances(), what, parts):
            self._digest(digest.update, part)
        name = digest.hexdigest()
        return self._folder / name[:2] / name[2:]

    def _write(self, path: Path, data: bytes) -> None:
        path.parent.mkdir(mode=0o700, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=".", dir=path.parent)
        with os.fdopen(handle, "wb") as stream:
            stream.write(_checksum(path, data))
            stream.write(data)
        Path(temporary).replace(path)

    def _tidy(self) -> None:
        """Remove leftovers, and the entries that were not used for longest until a tenth of the room is free."""
        found = [(path, path.stat()) for path in self._folder.glob("??/*") if path.is_file()]
        left = sum(status.st_size for _, status in found)
        for path, status in sorted(found, key=lambda entry: entry[1].st_mtime):
            leftover = path.name.startswith(".") and time.time() - status.st_mtime > _ABANDONED
            if leftover or left > 0.9 * self._limit:
                path.unlink(missing_ok=True)
                left -= status.st_size

    def _digest(self, update: Callable[[bytes], None], value: object) -> None:
        """Feed a value's content to a hash, each with its type, so that no two values give the same bytes."""
        update(f"<{type(value).__module__}.{type(value).__qualname__} ".encode())
        match value:
            case None | bool() | int() | float() | str() | bytes() if not isinstance(value, Enum):
                update(repr(value).encode())
            case Enum():
                update(value.name.encode())
            case np.ndarray() | np.generic():
                array = np.asarray(value)
                update(f"{array.dtype.str}{array.shape}".encode())
                update(repr(array.tolist()).encode() if array.dtype.hasobject else array.tobytes())
            case ir.Model():
                update(models.content_hash(value).encode())
            case Dataset():
                update(self._fingerprint(value).encode())
            case re.Pattern():
                update(f"{value.pattern!r}{value.flags}".encode())
            case tuple() | list():
                for item in value:
                    self._digest(update, item)
            case Mapping():
                for key, item in sorted(value.items(), key=lambda entry: repr(entry[0])):
                    self._digest(update, (key, item))
            case AbstractSet():
                for item in sorted(value, key=repr):
                    self._digest(update, item)
            case partial():
                self._digest(update, (value.func, value.args, value.keywords))
            case FunctionType() if "<locals>" not in value.__qualname__:
                update(f"{value.__module__}.{value.__qualname__}{_source(value.__module__)}".encode())
            case _ if is_dataclass(value) and not isinstance(value, type):
                update(_source(type(value).__module__).encode())
                for item in fields(value):
                    if item.compare:
                        self._digest(update, (item.name, getattr(value, item.name)))
            case _:
                raise _UnknownError(type(value))
        update(b">")

    def _fingerprint(self, data: Dataset) -> str:
        if id(data) not in self._datasets:
            self._datasets[id(data)] = data, data.fingerprint()
        return self._datasets[id(data)][1]


def _checksum(path: Path, data: bytes | memoryview) -> bytes:
    """Of an entry in its place: in that of another it does not fit."""
    digest = hashlib.sha256(path.name.encode())
    digest.update(data)
    return digest.digest()


def _opened(path: Path) -> memoryview:
    """What an entry holds.

    Raises:
        OSError: it cannot be read.
        ValueError: it is damaged.
    """
    whole = memoryview(path.read_bytes())
    checksum, data = whole[:_CHECKSUM], whole[_CHECKSUM:]
    if checksum != _checksum(path, data):
        raise ValueError(f"'{path}' is damaged")
    return data


class _Pickler(pickle.Pickler):
    """Models go as the bytes of their file."""

    def reducer_override(self, value: Any) -> Any:
        """How to make a model again."""
        return (models.load, (models.to_bytes(value),)) if isinstance(value, ir.Model) else NotImplemented


def _pickled(value: object) -> bytes:
    stream = io.BytesIO()
    _Pickler(stream, pickle.HIGHEST_PROTOCOL).dump(value)
    return stream.getvalue()


@cache
def _circumstances() -> tuple[str, ...]:
    """What every result depends on."""
    package, home = hashlib.sha256(), Path(__file__).parent
    for path in sorted(path for pattern in ("*.py", "numerics/*.py", "passes/*.py") for path in home.glob(pattern)):
        package.update(path.read_bytes())
    versions = [__version__, runtime.VERSION, platform.python_version(), *map(version, _LIBRARIES)]
    return package.hexdigest(), *versions, platform.platform(), *_processors()


def _processors() -> list[str]:
    """The processor, the cores that may be used, and NVIDIA's GPUs, as far as Linux says."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else platform.processor()
    lines = [line for line in text.splitlines() if line.startswith(("model name", "flags", "Features", "CPU part"))]
    gpus = Path("/proc/driver/nvidia/gpus").glob("*/information")
    models_of = [line for path in gpus for line in path.read_text().splitlines() if line.startswith("Model")]
    return [*sorted(set(lines)), f"{cores():g} cores", *sorted(models_of)]


@cache
def _source(module: str) -> str:
    """The code of a module that is no part of this package: that of others' techniques."""
    file = getattr(sys.modules.get(module), "__file__", None)
    if module.partition(".")[0] == "onnxcomp" or file is None:
        return ""
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()
