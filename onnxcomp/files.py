"""Files written atomically, and never where something is that must stay."""

import contextlib
import glob
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from onnxcomp import protos
from onnxcomp.errors import ModelError


def check_target(
    path: str | os.PathLike[str], *, overwrite: bool, inputs: Sequence[object] = (), option: str = "-o"
) -> None:
    """Refuse a target that could not be written, before any work is done.

    Args:
        path: the target.
        overwrite: whether an existing file may be replaced.
        inputs: models and data that must stay: those that are paths, with a model's external data.
        option: what the user gives another target to.

    Raises:
        ModelError: the folder does not exist or is not writable, the file exists and `overwrite` is off, or the target
            is one of `inputs`.
    """
    target = Path(path)
    folder = target.parent
    if not folder.is_dir():
        raise ModelError(f"the output folder '{folder}' does not exist", remedy=f"mkdir -p '{folder}'")
    if target.resolve() in files_of(inputs) or any(_holds(source, target) for source in inputs):
        raise ModelError(f"'{target}' is an input itself", "inputs are never modified", f"give another {option}")
    if target.is_dir():
        raise ModelError(f"'{target}' is a folder", remedy=f"give a file name to {option}")
    if target.exists() and not target.is_file():
        raise ModelError(f"'{target}' is no regular file", "a device or a pipe", f"give a file name to {option}")
    if target.exists() and not overwrite:
        raise ModelError(f"'{target}' exists", remedy=f"add --overwrite, or give another name to {option}")
    _temporary(target, f"give another {option}").unlink()  # access rights alone do not tell


def files_of(inputs: Sequence[object]) -> set[Path]:
    """The files that inputs are, links and what they lead to, and those in which models keep external data."""
    files: set[Path] = set()
    for path in (Path(source) for source in inputs if isinstance(source, str | os.PathLike)):
        files |= {path.resolve(), path.parent.resolve() / path.name}
        if path.is_file() and path.suffix == ".onnx":
            with contextlib.suppress(ModelError):  # loading will say what is wrong with it
                parts = protos.external_parts(protos.parse(protos.read(path), str(path)), str(path))
                files |= {(path.resolve().parent / location).resolve() for location, _, _ in parts}
    return files


def _holds(source: object, target: Path) -> bool:
    """Whether the target is a file in a folder of data."""
    if not isinstance(source, str | os.PathLike) or not Path(source).is_dir():
        return False
    return target.exists() and target.resolve().is_relative_to(Path(source).resolve())


@contextlib.contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A temporary file beside `target` that takes its place at the end, or is removed on any error."""
    temporary = _temporary(target)
    try:
        yield temporary
        with temporary.open("rb+") as stream:
            os.fsync(stream.fileno())
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(target)
    except OSError as error:
        raise ModelError(f"cannot write '{target}': {error.strerror}", "the disk is full or read-only") from error
    finally:
        temporary.unlink(missing_ok=True)


def _temporary(target: Path, remedy: str = "") -> Path:
    """An empty file beside `target`, named after it and this process.

    Raises:
        ModelError: it cannot be made.
    """
    try:
        _remove_leftovers(target)
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.{os.getpid()}.", dir=target.parent)
    except OSError as error:
        raise ModelError(f"cannot write to '{target.parent}': {error.strerror}", remedy=remedy) from error
    os.close(handle)
    return Path(name)


def _remove_leftovers(target: Path) -> None:
    """Remove what processes that were killed on this machine left of their temporary files."""
    for path in target.parent.glob(f".{glob.escape(target.name)}.*.*"):
        process = path.name.removeprefix(f".{target.name}.").partition(".")[0]
        if process.isdecimal() and not _runs(int(process)):
            path.unlink(missing_ok=True)


def _runs(process: int) -> bool:
    """Whether there is such a process; elsewhere than on POSIX, where asking may end it, there is."""
    if os.name != "posix":
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # it is somebody else's
    return True


def write_text(text: str, path: str | os.PathLike[str]) -> None:
    """Write a report atomically; an existing file is replaced.

    Raises:
        ModelError: the folder does not exist or is not writable.
    """
    target = Path(path)
    if target.exists() and not target.is_file() and not target.is_dir():
        target.write_text(text, encoding="utf-8")  # a pipe or a device
        return
    check_target(target, overwrite=True)
    with replacing(target) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
