"""Work in a process of its own, where nothing is warm and no memory is in pieces.

What a long search leaves behind slows a model down that is loaded after it: the same INT8 model was seen to run 2.5
times as fast as the original in a new process, and 2.15 times in one that had measured and fitted others before.

A search starts many such processes, so they import little: nothing on the way to a timing or a profile imports onnx_ir
before a model needs it.
"""

import contextlib
import importlib
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from onnxcomp.errors import OnnxcompError

if TYPE_CHECKING:
    import onnx_ir as ir

Given = ParamSpec("Given")
Found = TypeVar("Found")


def fresh(function: Callable[Given, Found], *given: Given.args, **named: Given.kwargs) -> Found:
    """What a function of a module gives when a new process calls it.

    Raises:
        OnnxcompError: the process failed, for want of memory perhaps.
    """
    call = function.__module__, function.__qualname__, given, named
    done = subprocess.run(
        [sys.executable, "-m", "onnxcomp.fresh"], input=pickle.dumps(call), capture_output=True, check=False
    )
    if done.returncode:
        last = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise OnnxcompError(f"a fresh process failed (exit code {done.returncode})", *last)
    found: Found = pickle.loads(done.stdout)
    return found


@contextlib.contextmanager
def files_of(candidates: "Iterable[ir.Model]") -> Iterator[list[Path]]:
    """Models as files, for another process to read, while the context lasts."""
    from onnxcomp import model as models

    with tempfile.TemporaryDirectory(prefix="onnxcomp-") as folder:
        paths = []
        for number, candidate in enumerate(candidates):
            paths.append(Path(folder) / f"{number}.onnx")
            models.save(candidate, paths[-1])
        yield paths


def _serve() -> None:
    """Answer on standard output, which nothing else may write to meanwhile."""
    answers = os.dup(1)
    os.dup2(2, 1)
    module, name, given, named = pickle.loads(sys.stdin.buffer.read())
    found = getattr(importlib.import_module(module), name)(*given, **named)
    with os.fdopen(answers, "wb") as stream:
        stream.write(pickle.dumps(found))


if __name__ == "__main__":
    _serve()
