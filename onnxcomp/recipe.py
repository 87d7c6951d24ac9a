"""Recipes: which passes, with which settings, in which order. docs/recipes.md documents their YAML."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from io import StringIO
from typing import Any, Self, TypeAlias

import yaml

from onnxcomp import registry, settings
from onnxcomp.core import Pass, node_pattern
from onnxcomp.errors import OptionError, did_you_mean
from onnxcomp.settings import Schema, Settings

Path: TypeAlias = tuple[int | str, ...]
"""What a recipe says, by keys: of a pass its number and name, a setting, and what that names."""

VERSION = 1
"""Of the format."""

_WIDTH = 120

_PLAIN = r"[A-Za-z_/][\w./-]*"
"""Texts that no reader of YAML takes for anything else, unless they are one of its words."""

_WORDS = frozenset(["null", "true", "false", "yes", "no", "on", "off", "y", "n"])


@dataclass(frozen=True)
class Recipe:
    """What makes one model of another.

    Attributes:
        passes: what is done, in this order.
        seed: of everything random.
        exclude: regular expression of node names to leave alone.
        places: where the file that the recipe was read from says what; empty for others. See `where`.

    Raises:
        OptionError: `exclude` is not a regular expression, or the seed is negative.
    """

    passes: tuple[Pass, ...] = ()
    seed: int = 0
    exclude: str | None = None
    places: Mapping[Path, str] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        node_pattern(self.exclude)
        if self.seed < 0:
            raise OptionError(f"a seed of {self.seed} is not possible", remedy="give 0 or more")

    def where(self, number: int, *names: str) -> str:
        """Where a file says something of a pass, or names the pass if not that; empty if no file does.

        Args:
            number: of the pass.
            names: a setting, and what is named there.
        """
        path: Path = (number, self.passes[number].name, *names)
        return next((self.places[path[:end]] for end in range(len(path), 1, -1) if path[:end] in self.places), "")

    def to_yaml(self) -> str:
        """The recipe with all settings: those at their defaults too, for defaults may change.

        Raises:
            OptionError: a pass has a setting that no recipe can hold.
        """
        head: dict[str, Any] = {"onnxcomp": VERSION, "seed": self.seed}
        if self.exclude is not None:
            head["exclude"] = self.exclude
        steps = [{item.name: Settings(type(item)).plain(item)} for item in self.passes]
        return _written(head | {"passes": [next(iter(s)) if not next(iter(s.values())) else s for s in steps]})

    @classmethod
    def from_yaml(cls, text: str, name: str = "the recipe") -> Self:
        """Read a recipe.

        Args:
            text: YAML.
            name: of the file, for messages.

        Raises:
            OptionError: not a recipe; with line and column, what is wrong, and the remedy.
        """
        root = settings.compose(text, name)
        if root is None:
            raise OptionError(f"{name}, line 1, column 1: it is empty", remedy="see docs/recipes.md for an example")
        given = {key: (where, value) for key, where, value in settings.entries(root, "a recipe")}
        _check_version(root, given.get("onnxcomp"))
        values: dict[str, Any] = {}
        for key, (where, value) in given.items():
            if key not in _HEAD:
                remedy = f"one of {', '.join(_HEAD)}"
                raise settings.refused(where, f"a recipe has no '{key}'", did_you_mean(key, _HEAD), remedy)
            if key in {"seed", "exclude"}:
                values[key] = settings.form(_HEAD[key]).read(value)
        if "passes" not in given:
            raise settings.refused(root, "a recipe without passes", remedy="add `passes:` and a list")
        steps = given["passes"][1]
        if not isinstance(steps, yaml.SequenceNode):
            raise settings.refused(steps, "'passes' is not a list", remedy="write one pass on each line, behind a `-`")
        values["passes"] = tuple(map(_step, steps.value))
        values["places"] = {(key,): settings.place(value) for key, (_, value) in given.items()} | {
            (number, *path): settings.place(node)
            for number, step in enumerate(steps.value)
            for path, node in _said(step, ())
        }
        try:
            return cls(**values)
        except OptionError as error:
            key = "seed" if values.get("seed", 0) < 0 else "exclude"
            raise settings.refused(given[key][1], error.fact, error.cause, f"mend '{key}'") from error


_HEAD: Mapping[str, Any] = {"onnxcomp": int, "seed": int, "exclude": str | None, "passes": None}


def _check_version(root: yaml.Node, given: tuple[yaml.Node, yaml.Node] | None) -> None:
    remedy = f"begin it with `onnxcomp: {VERSION}`, the version of the format"
    if given is None:
        raise settings.refused(root, "a recipe without a version", "it is no recipe", remedy)
    version = settings.form(int).read(given[1])
    if version != VERSION:
        raise settings.refused(
            given[1],
            f"version {version} of the format is not known",
            "a newer onnxcomp wrote it" if version > VERSION else "",
            "upgrade onnxcomp" if version > VERSION else remedy,
        )


def _step(node: yaml.Node) -> Pass:
    """A pass by its name, or as a mapping from its name to its settings."""
    name, key, values = node.value, node, None
    if not isinstance(node, yaml.ScalarNode):
        parts = list(settings.entries(node, "a pass"))
        if len(parts) != 1:
            remedy = "begin each pass with a `-`, and its settings further right"
            raise settings.refused(node, f"expected one pass, found {len(parts)} names", "indentation", remedy)
        name, key, values = parts[0]
    try:
        kind = registry.named(name)
    except OptionError as error:
        raise error.at(settings.place(key)) from error
    shape = Settings(kind)
    bare = values is None or (isinstance(values, yaml.ScalarNode) and not values.value)
    made: Pass = shape.build(node, {}) if bare or values is None else shape.read(values)
    return made


def _said(node: yaml.Node, path: Path) -> Iterator[tuple[Path, yaml.Node]]:
    """Each text, behind the keys that lead to it, with its node; keys are texts too."""
    if isinstance(node, yaml.ScalarNode):
        yield (*path, node.value), node
    for item in node.value if isinstance(node, yaml.CollectionNode) else []:
        if isinstance(item, yaml.Node):
            yield from _said(item, path)
        else:
            key, value = item
            yield (*path, key.value), key
            yield from _said(value, (*path, key.value))


# --- writing --------------------------------------------------------------------------------------------------------


class _Dumper(yaml.SafeDumper):
    """Texts are quoted wherever some reader of YAML could take them for something else."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    plain = re.fullmatch(_PLAIN, text, re.ASCII) and text.lower() not in _WORDS
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if plain else '"')


_Dumper.add_representer(str, _text)


def _written(document: Mapping[str, Any]) -> str:
    """YAML with one pass on each line, where it has no settings that are mappings or lists."""
    stream = StringIO()
    dumper = _Dumper(stream, width=_WIDTH, sort_keys=False)
    dumper.open()
    root = dumper.represent_data(document)
    _flow(root)
    root.flow_style = False  # type: ignore[attr-defined]
    dumper.serialize(root)
    dumper.close()
    return stream.getvalue()


def _flow(node: yaml.Node) -> None:
    """Collections of scalars on one line, others on several."""
    if isinstance(node, yaml.CollectionNode):
        parts = [part for item in node.value for part in (item if isinstance(item, tuple) else (item,))]
        node.flow_style = all(isinstance(part, yaml.ScalarNode) or not part.value for part in parts)
        for part in parts:
            _flow(part)


# --- the schema -----------------------------------------------------------------------------------------------------


def schema(kinds: Mapping[str, type[Pass]]) -> Schema:
    """JSON schema of recipes with these passes, for editors and other tools.

    Args:
        kinds: passes by name.
    """
    steps: list[Schema] = [{"enum": list(kinds), "description": "A pass with all settings at their defaults."}]
    for name, kind in kinds.items():
        body = Settings(kind).schema() | {"description": kind.summary}
        steps.append({"type": "object", "properties": {name: body}, "required": [name], "additionalProperties": False})
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A recipe of onnxcomp",
        "description": "What `onnxcomp apply` repeats; docs/recipes.md explains it.",
        "type": "object",
        "properties": {
            "onnxcomp": {"const": VERSION, "description": "version of the format."},
            "seed": {"type": "integer", "minimum": 0, "default": 0, "description": "of everything random."},
            "exclude": {"type": ["string", "null"], "description": "regular expression of node names to leave alone."},
            "passes": {"type": "array", "items": {"anyOf": steps}, "description": "what is done, in this order."},
        },
        "required": ["onnxcomp", "passes"],
        "additionalProperties": False,
    }
