"""The results that are worth a choice: none of them is beaten in accuracy, latency and size at once by another.

A folder holds them, `01.onnx` the fastest, beside `pareto.json`, which is written last: it never names a file that is
not there.
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import onnx_ir as ir

from onnxcomp import files
from onnxcomp import model as models
from onnxcomp.errors import ModelError
from onnxcomp.report import Document, Figures

INDEX = "pareto.json"
_MEMBER = re.compile(r"\d\d\.onnx")
_OURS = re.compile(rf"{_MEMBER.pattern}(\.data)?|{re.escape(INDEX)}")


@dataclass(frozen=True)
class Member:
    """One of a family.

    Attributes:
        file: its name in the folder.
        name: what it is.
        figures: measured on the final data.
        chosen: whether it is what the budget asks for.
    """

    file: str
    name: str
    figures: Figures
    chosen: bool


@dataclass(frozen=True)
class Family(Document):
    """Results of one search that are worth a choice, the fastest first.

    Attributes:
        source: the input.
        original: its figures.
        members: the results.
        metric: name of what was scored.
        data: on which samples.
        protocol: how latency was measured.
        environment: as in a report.
    """

    kind: ClassVar[str] = "family"

    source: str
    original: Figures
    members: tuple[Member, ...]
    metric: str
    data: str
    protocol: str
    environment: Mapping[str, str | int]


def check_apart(folder: str | os.PathLike[str], others: Sequence[object]) -> None:
    """Refuse what is, or is to be, where a family in that folder may write.

    Args:
        folder: where the family is to be.
        others: models, data and outputs; what is no path is nowhere.

    Raises:
        ModelError: so it is.
    """
    place = Path(folder).resolve()
    for other in sorted(files.files_of(others)):
        if other == place or (other.parent == place and _OURS.fullmatch(other.name)):
            raise ModelError(
                f"'{other}' is where --pareto may write",
                "inputs are never modified, and no output replaces another",
                "give another folder to --pareto",
            )


def check_folder(folder: str | os.PathLike[str], *, overwrite: bool) -> None:
    """Refuse a folder that could not be written, or holds something already.

    Raises:
        ModelError: so it is.
    """
    path = Path(folder)
    if path.exists() and not path.is_dir():
        raise ModelError(f"'{path}' is no folder", remedy="give another folder to --pareto")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise ModelError(f"the folder '{path}' is not empty", remedy="add --overwrite, or give another to --pareto")
    files.check_target(path / INDEX if path.is_dir() else path, overwrite=True, option="--pareto")


def write(family: Family, made: Sequence[ir.Model], folder: str | os.PathLike[str]) -> None:
    """Write the models and then the index; files of a family that was there before go.

    Raises:
        ModelError: something cannot be written.
    """
    path = Path(folder)
    try:
        path.mkdir(exist_ok=True)
    except OSError as error:
        raise ModelError(f"cannot make '{path}': {error.strerror}", remedy="give another folder to --pareto") from error
    before = _files(path)
    (path / INDEX).unlink(missing_ok=True)
    for member, model in zip(family.members, made, strict=True):
        models.save(model, path / member.file, overwrite=True)
    for name in before - {member.file for member in family.members}:
        (path / name).unlink(missing_ok=True)
        (path / f"{name}.data").unlink(missing_ok=True)
    files.write_text(json.dumps(family.to_json(), indent=2, allow_nan=False) + "\n", path / INDEX)


def _files(folder: Path) -> set[str]:
    """Names of the models of a family that is there; none that it cannot have written."""
    try:
        members = json.loads((folder / INDEX).read_text(encoding="utf-8"))["members"]
        return {member["file"] for member in members if _MEMBER.fullmatch(member["file"])}
    except (OSError, ValueError, KeyError, TypeError):
        return set()
