"""What a model takes in a process of its own: the time to load it, and the memory to load and run it.

A fresh process, since in one that has loaded other models their memory is reused and libraries are warm.
"""

import contextlib
import re
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

import onnxcomp.model  # noqa: F401  (imported when a model needs it, it would count as that model's memory)
from onnxcomp.errors import OnnxcompError
from onnxcomp.fresh import files_of, fresh
from onnxcomp.runtime import Feeds, Session, Target

_RUNS = 2  # ONNX Runtime plans its memory in the first run


@dataclass(frozen=True)
class Footprint:
    """One process.

    Attributes:
        load_seconds: from the file to a session that can run.
        memory: bytes by which the process grew at most; None where the system does not say (outside Linux).
    """

    load_seconds: float
    memory: int | None


def footprint(path: Path, target: Target, feeds: Feeds) -> Footprint:
    """Load and run a model in a fresh process.

    Raises:
        OnnxcompError: the process failed, for want of memory perhaps.
    """
    try:
        return fresh(measured, path, target, dict(feeds))
    except OnnxcompError as error:
        raise OnnxcompError(f"'{path}' could not be loaded and run: {error.fact}", error.cause) from error


def memory_of(model: ir.Model, target: Target, feeds: Feeds) -> int | None:
    """Bytes by which a fresh process grows that loads and runs a model.

    Raises:
        OnnxcompError: the process failed.
    """
    with files_of([model]) as paths:
        return footprint(paths[0], target, feeds).memory


def _memory(key: str) -> int | None:
    """Bytes of this process: `VmRSS` now, `VmHWM` at its peak."""
    status = Path("/proc/self/status")
    found = re.search(rf"^{key}:\s*(\d+) kB", status.read_text(), re.MULTILINE) if status.exists() else None
    return int(found[1]) * 1024 if found else None


def measured(path: Path, target: Target, feeds: Feeds) -> Footprint:
    """Load and run a model in this process."""
    before = _memory("VmRSS")
    with contextlib.suppress(OSError):  # not allowed everywhere; imports peak little above what they keep
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    session = Session(path, target)
    for _ in range(_RUNS):
        session.run(feeds)
    after = _memory("VmHWM")
    growth = None if before is None or after is None else max(after - before, 0)
    return Footprint(session.load_seconds, growth)
