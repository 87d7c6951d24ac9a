"""Models timed side by side in a process of their own."""

from collections.abc import Sequence
from pathlib import Path

import onnx_ir as ir

from onnxcomp import runtime
from onnxcomp.fresh import files_of, fresh
from onnxcomp.runtime import Feeds, Protocol, Session, Target, Timing


def time_apart(candidates: Sequence[ir.Model], target: Target, feeds: Feeds, protocol: Protocol) -> list[Timing]:
    """Time models beside the first, as `runtime.compare` does, in a new process.

    Raises:
        OnnxcompError: it failed.
    """
    with files_of(candidates) as paths:
        return fresh(timed, paths, target, dict(feeds), protocol)


def timed(paths: Sequence[Path], target: Target, feeds: Feeds, protocol: Protocol) -> list[Timing]:
    """Time models in this process."""
    return runtime.compare([Session(path, target) for path in paths], feeds, protocol)
