"""What a model says of itself, in its metadata: what made it, of what, what was done to each node, and why not more.

| key | value |
|---|---|
| `onnxcomp.version` | of the tool |
| `onnxcomp.input` | SHA-256 of the input |
| `onnxcomp.recipe` | YAML, as docs/recipes.md describes it |
| `onnxcomp.record` | base64 of zlib of JSON, without what is measured by the clock: same work, same bytes |
"""

import base64
import json
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, TypeVar

import onnx
import onnx_ir as ir

from onnxcomp import __version__
from onnxcomp import model as models
from onnxcomp.core import Change, Skip
from onnxcomp.errors import ModelError, OptionError
from onnxcomp.model import ModelSource
from onnxcomp.recipe import Recipe
from onnxcomp.report import Figures, Step, Trial
from onnxcomp.settings import LONGEST

T = TypeVar("T", Change, Skip)

_PREFIX = "onnxcomp."
_MOST = 2**24
"""Bytes of a record, unpacked."""


@dataclass(frozen=True)
class Record:
    """What was done and what was not.

    Attributes:
        steps: what each pass of the recipe did, with its name for a recipe.
        trials: what else was tried when the recipe was found, without latencies.
        metric: in whose unit their losses are.
    """

    steps: tuple[Step, ...] = ()
    trials: tuple[Trial, ...] = ()
    metric: str = ""

    def packed(self) -> str:
        """The record as text. Nodes are grouped by what was done to them."""
        content = {
            "steps": [
                [
                    _grouped((change.what, change.node) for change in step.changes),
                    _grouped((skip.reason, skip.node) for skip in step.skips),
                ]
                for step in self.steps
            ],
            "metric": self.metric,
            "trials": [[t.name, t.figures.size, _rounded(t.figures.drop), t.verdict] for t in self.trials],
        }
        text = json.dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
        return base64.b64encode(zlib.compress(text.encode(), 9)).decode()

    @classmethod
    def unpacked(cls, text: str, recipe: Recipe, name: str) -> Self:
        """Read a record.

        Args:
            text: as `packed` gives it.
            recipe: that it belongs to.
            name: of the model, for messages.

        Raises:
            ModelError: it is damaged, or was not written by onnxcomp.
        """
        try:
            unpacking = zlib.decompressobj()
            raw = unpacking.decompress(base64.b64decode(text, validate=True), _MOST)
            if not unpacking.eof:
                raise ValueError("it is cut off" if not unpacking.unconsumed_tail else f"more than {_MOST:,} bytes")
            content = json.loads(raw)
            steps = tuple(
                Step(technique.name, _each(Change, done), _each(Skip, left))
                for technique, (done, left) in zip(recipe.passes, content["steps"], strict=True)
            )
            trials = tuple(
                Trial(_text(of), Figures(_count(size), drop=None if drop is None else float(drop)), _text(verdict))
                for of, size, drop, verdict in content["trials"]
            )
            return cls(steps, trials, _text(content["metric"]))
        except (ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError, zlib.error) as error:
            raise ModelError(
                f"the record in {name} cannot be read: {error}",
                "the metadata were changed or cut off, or another program wrote them",
                "make the model again with onnxcomp",
            ) from error


def _grouped(pairs: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = defaultdict(list)
    for text, node in pairs:
        groups[text].append(node)
    return dict(groups)


def _rounded(drop: float | None) -> float | str | None:
    """Three digits. JSON has no infinity."""
    text = "" if drop is None else f"{drop:.3g}"
    return None if drop is None else text if text in {"inf", "-inf", "nan"} else float(text)


def _each(kind: Callable[[str, str], T], groups: dict[str, list[str]]) -> tuple[T, ...]:
    return tuple(kind(_text(node), _text(text)) for text, nodes in groups.items() for node in nodes)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{type(value).__name__} in place of a text")
    return value


def _count(value: Any) -> int:
    if not isinstance(value, int) or not 0 <= value < 2**63:
        raise TypeError("no size")
    return value


# --- in models ------------------------------------------------------------------------------------------------------


def stamped(
    model: ir.Model,
    source: ir.Model,
    recipe: Recipe,
    record: Record,
    fingerprint: str,
    room: int,
    growth: float = 0.0,
) -> ir.Model:
    """A clone that says in its metadata what made it, and what came of that.

    The record is left out where there is no room for it.

    Args:
        model: the result.
        source: the input.
        recipe: what made it.
        record: what came of each pass.
        fingerprint: of the input.
        room: bytes that the file may take with the record, as the input does, or a limit allows.
        growth: share of the result's tensors that the record may take even so.
    """
    clone = signed(model, source, recipe, fingerprint)
    text = record.packed()
    clone.metadata_props[f"{_PREFIX}record"] = text
    little = len(text) <= growth * models.tensor_bytes(clone)
    if not little and models.file_bytes(clone) > room:
        del clone.metadata_props[f"{_PREFIX}record"]
    return clone


def signed(model: ir.Model, source: ir.Model, recipe: Recipe, fingerprint: str) -> ir.Model:
    """A clone that says in its metadata what made it.

    Types of values between nodes go where the input did not tell them: readers infer them, and in a small model they
    take more bytes than the recipe does.

    Args:
        model: the result.
        source: the input.
        recipe: what made it.
        fingerprint: of the input.
    """
    clone = model.clone()
    models.forget_types(clone, models.typed(source))
    for key in [key for key in clone.metadata_props if key.startswith(_PREFIX)]:
        del clone.metadata_props[key]
    clone.metadata_props.update(
        {
            f"{_PREFIX}version": __version__,
            f"{_PREFIX}input": fingerprint,
            f"{_PREFIX}recipe": recipe.to_yaml(),
        }
    )
    return clone


@dataclass(frozen=True)
class Origin:
    """Where a recipe was read from.

    Attributes:
        recipe: the recipe.
        source: what was given.
        record: that of the model which the recipe was taken from, where it has one.
        version, input: of that model; empty for a file.
    """

    recipe: Recipe
    source: object = None
    record: Record | None = None
    version: str = ""
    input: str = field(default="", repr=False)

    @classmethod
    def of(cls, source: "Recipe | ModelSource") -> Self:
        """Read a recipe from a YAML file, or from a model that onnxcomp made.

        Raises:
            OptionError: not a recipe.
            ModelError: not a model, or not one that onnxcomp made, or its record is damaged.
        """
        if isinstance(source, Recipe):
            return cls(source)
        if isinstance(source, ir.Model | onnx.ModelProto | bytes) or _is_model(Path(source)):
            return cls.in_model(source)
        path = Path(source)
        content = path.read_bytes()
        try:
            return cls(Recipe.from_yaml(content.decode(), str(path)), path)
        except UnicodeDecodeError as error:
            before = content[: error.start]
            line, column = before.count(b"\n") + 1, error.start - before.rfind(b"\n")
            raise OptionError(
                f"{path}, line {line}, column {column}: not YAML: not UTF-8", "a binary file", "give a recipe"
            ) from None

    @classmethod
    def in_model(cls, source: ModelSource) -> Self:
        """Read what a model says of itself.

        Raises:
            ModelError: it does not say anything, or what it says is damaged.
        """
        name = str(source) if isinstance(source, str | Path) else "the model"
        said = models.metadata(source)
        if f"{_PREFIX}recipe" not in said:
            raise ModelError(
                f"{name} has no recipe in its metadata",
                "onnxcomp did not make it, or found nothing that makes it better and wrote it as it was, "
                "or another tool wrote it again since",
                "give a model that onnxcomp changed",
            )
        recipe = Recipe.from_yaml(said[f"{_PREFIX}recipe"], f"the recipe in {name}")
        text = said.get(f"{_PREFIX}record")
        record = None if text is None else Record.unpacked(text, recipe, name)
        return cls(recipe, source, record, said.get(f"{_PREFIX}version", ""), said.get(f"{_PREFIX}input", ""))


def _is_model(path: Path) -> bool:
    """Whether a file is to be read as a model: by its name, or its first byte, with which no text begins.

    Raises:
        OptionError: it cannot be read, or is far too large for a recipe.
    """
    if path.suffix == ".onnx":
        return True
    try:
        with path.open("rb") as stream:
            start = stream.read(1)
        size = path.stat().st_size
    except FileNotFoundError as error:
        raise OptionError(f"no such file: '{path}'", remedy="check the path of the recipe") from error
    except IsADirectoryError as error:
        raise OptionError(f"'{path}' is a folder, not a recipe", remedy="give a YAML file, or a model") from error
    except OSError as error:
        raise OptionError(f"cannot read '{path}': {error.strerror}") from error
    if start == b"\x08":
        return True
    if size > 4 * LONGEST:  # bytes of a character
        raise OptionError(f"'{path}' is far too large for a recipe: {size:,} bytes", remedy="give a YAML file")
    return False
