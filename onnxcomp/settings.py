"""Settings as text: what a type hint allows, as plain values, read from YAML, and as a JSON schema.

A hint stands for a form: bool, int, float, str, an Enum of texts, None or another, tuples of fixed and of any length,
frozen dataclasses as mappings, and `tuple[tuple[str, T], ...]` as a mapping from names to T. Scalars are read by the
form that is wanted, not by YAML's guess: a node may be called `on`, `12` or `1e3`, and `1e-3` is a number. What is
annotated has limits: `Annotated[int, within(1, 8)]`.
"""

import contextlib
import dataclasses
import enum
import functools
import inspect
import math
import operator
import re
import types
import typing
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import Annotated, Any

import yaml

from onnxcomp.errors import OptionError, did_you_mean

Schema = dict[str, Any]

_DEPTH = 20
"""Levels of nesting, far more than any setting has."""

_SHOWN = 60
"""Characters of a value that messages show."""

LONGEST = 2**22
"""Characters of a recipe, far more than any has: reading more would take minutes."""

_KINDS = ("bool", "float", "int", "map", "merge", "null", "seq", "str", "timestamp", "value")
_IMPLICIT = {f"tag:yaml.org,2002:{kind}" for kind in _KINDS}


@dataclass(frozen=True, eq=False)
class Limits:
    """Which values of its type a setting takes.

    Attributes:
        words: what follows the name of the type, e.g. ` from 1 to 8`.
        hold: whether a value is one.
        schema: the same as keywords of a JSON schema, as far as it has words for it.
    """

    words: str
    hold: Callable[[Any], bool]
    schema: Schema


def within(
    least: float | None = None, most: float | None = None, *, above: float | None = None, below: float | None = None
) -> Limits:
    """Limits of a number, which may be the `least` or the `most` itself."""
    rules = [
        ("above", operator.gt, "exclusiveMinimum", above),
        ("at least", operator.ge, "minimum", least),
        ("below", operator.lt, "exclusiveMaximum", below),
        ("at most", operator.le, "maximum", most),
    ]
    given = [(word, holds, key, limit) for word, holds, key, limit in rules if limit is not None]
    words = " and ".join(f"{word} {limit:g}" for word, _, _, limit in given)
    if least is not None and most is not None:
        words = f"from {least:g} to {most:g}"
    return Limits(
        f" of {words}" if words.startswith("at") else f" {words}",
        lambda value: all(holds(value, limit) for _, holds, _, limit in given),
        {key: limit for _, _, key, limit in given},
    )


def among(*values: int) -> Limits:
    """Limits of a number that is one of a few."""
    return Limits(f", {' or '.join(map(str, values))}", lambda value: value in values, {"enum": list(values)})


def like(pattern: str, *examples: str) -> Limits:
    """Limits of a text, by a regular expression for the whole of it."""
    words = " or ".join(f"`{example}`" for example in examples)
    return Limits(f" like {words}", lambda text: bool(re.fullmatch(pattern, text)), {"pattern": f"^({pattern})$"})


class Form(ABC):
    """What values of a hint look like."""

    @abstractmethod
    def plain(self, value: Any) -> Any:
        """The value as bool, int, float, str, None, list or dict.

        Raises:
            TypeError, ValueError: it is of another form, or beyond its limits.
            OptionError: a setting of a dataclass is.
        """

    @abstractmethod
    def read(self, node: yaml.Node) -> Any:
        """The value that a YAML node stands for.

        Raises:
            OptionError: another form, with the place.
        """

    @abstractmethod
    def schema(self) -> Schema:
        """JSON schema of what `plain` gives."""


@functools.cache
def form(hint: Any) -> Form:
    """The form of a type hint.

    Raises:
        OptionError: no setting of a recipe can be of that type.
    """
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        limits = next((item for item in inner[1:] if isinstance(item, Limits)), None)
        shape = form(inner[0])
        return replace(shape, limits=limits) if isinstance(shape, _Scalar) else shape
    if hint in _SCALARS:
        return _SCALARS[hint]
    if hint is type(None):
        return _Nothing()
    if isinstance(hint, type) and issubclass(hint, enum.Enum) and all(isinstance(item.value, str) for item in hint):
        return _OneOf(hint)
    if dataclasses.is_dataclass(hint):
        return Settings(hint)
    if origin in {types.UnionType, typing.Union}:
        return _Either(tuple(form(arm) for arm in sorted(inner, key=lambda arm: arm is not type(None))))
    if origin is tuple and len(inner) == 2 and inner[1] is Ellipsis:
        pair = typing.get_args(inner[0])
        if typing.get_origin(inner[0]) is tuple and len(pair) == 2 and pair[0] is str and pair[1] is not Ellipsis:
            return _ByName(form(pair[1]))
        return _List(form(inner[0]))
    if origin is tuple:
        return _Row(tuple(form(item) for item in inner))
    raise OptionError(
        f"a recipe cannot hold a {getattr(hint, '__name__', hint)}",
        remedy="make the setting a bool, int, float, str, StrEnum, tuple or frozen dataclass, or None",
    )


# --- YAML nodes -----------------------------------------------------------------------------------------------------


def place(node: yaml.Node) -> str:
    """Where a node begins, as messages say it."""
    return _at(node.start_mark)


def _at(mark: Any) -> str:
    return f"{mark.name}, line {mark.line + 1}, column {mark.column + 1}"


def refused(node: yaml.Node, fact: str, cause: str = "", remedy: str = "") -> OptionError:
    """An error that says where."""
    return OptionError(f"{place(node)}: {fact}", cause, remedy)


class _Loader(yaml.SafeLoader):
    """Composes nodes, and constructs nothing."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """One node of the document, refused where it is no plain data."""
        event = self.peek_event()  # type: ignore[no-untyped-call]
        mark = event.start_mark
        if self.check_event(yaml.AliasEvent):
            raise OptionError(f"{_at(mark)}: an alias", "a recipe repeats nothing", "write the value itself")
        if event.anchor is not None:
            raise OptionError(f"{_at(mark)}: the anchor '&{event.anchor}'", "a recipe repeats nothing", "remove it")
        self.depth += 1
        if self.depth > _DEPTH:
            raise OptionError(f"{_at(mark)}: nested too deeply", remedy="see docs/recipes.md")
        node: yaml.Node | None = super().compose_node(parent, index)
        self.depth -= 1
        if node is not None and node.tag not in _IMPLICIT:
            raise refused(node, f"the tag '{node.tag}'", "a recipe holds plain values only", "remove the tag")
        return node


def compose(text: str, name: str) -> yaml.Node | None:
    """The document as nodes, None where it is empty.

    Args:
        text: YAML.
        name: of the file, for messages.

    Raises:
        OptionError: not YAML, or more than plain data.
    """
    remedy = "see docs/recipes.md for an example"
    if len(text) > LONGEST:
        raise OptionError(f"{name}, line 1, column 1: far too long for a recipe: {len(text):,} characters")
    try:
        loader = _Loader(text)
        loader.name = name
        try:
            root: yaml.Node | None = loader.get_single_node()
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = name if mark is None else _at(mark)
        raise OptionError(f"{where}: not YAML: {error.problem or error.context}", remedy=remedy) from None
    except yaml.reader.ReaderError as error:
        before = text[: error.position]
        column = error.position - (before.rfind("\n") + 1)
        where = f"{name}, line {before.count(chr(10)) + 1}, column {column + 1}"
        raise OptionError(f"{where}: not YAML: {error.reason}", "a binary file", remedy) from None
    return root


def entries(node: yaml.Node, what: str) -> Iterator[tuple[str, yaml.Node, yaml.Node]]:
    """Key, its node and the value's of a mapping.

    Raises:
        OptionError: no mapping, or a key that is there twice or is none.
    """
    if not isinstance(node, yaml.MappingNode):
        raise refused(node, f"expected {what}, found {_found(node)}", remedy="write `name: value`, one below the other")
    seen = set()
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise refused(key, f"expected a name, found {_found(key)}")
        if key.value in seen:
            raise refused(key, f"'{key.value}' is there twice", remedy="leave one of them")
        seen.add(key.value)
        yield key.value, key, value


def _found(node: yaml.Node) -> str:
    if isinstance(node, yaml.ScalarNode):
        text = node.value if len(node.value) < _SHOWN else f"{node.value[:_SHOWN]}..."
        return f"{'the text ' if node.style else ''}'{text}'" if text or node.style else "nothing"
    return "a list" if isinstance(node, yaml.SequenceNode) else "a mapping"


def _inside(node: yaml.Node, path: Sequence[str]) -> yaml.Node:
    """The value at the end of a path of keys, as far as there is one."""
    for name in path:
        pairs = node.value if isinstance(node, yaml.MappingNode) else []
        node = next((value for key, value in pairs if key.value == name), node)
    return node


def _is_null(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.style is None and node.value in {"", "~", "null"}


# --- forms ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Scalar(Form):
    """One plain text after a pattern, perhaps with limits to what it stands for."""

    noun: str
    pattern: str
    json: str
    kind: type
    python: Callable[[Any], Any]
    build: Callable[[str], Any]
    limits: Limits | None = None

    @property
    def words(self) -> str:
        """What is expected."""
        return self.noun + (self.limits.words if self.limits else "")

    def plain(self, value: Any) -> Any:
        fits = isinstance(value, self.kind) and (not isinstance(value, bool) or self.json == "boolean")
        if not fits or not self._holds(value):
            raise TypeError(f"expected {self.words}, found {value!r}")
        return self.python(value)

    def read(self, node: yaml.Node) -> Any:
        if isinstance(node, yaml.ScalarNode) and (node.value if node.style is None else self.json == "string"):
            value = self.build(node.value) if re.fullmatch(self.pattern, node.value, re.DOTALL) else None
            overflown = isinstance(value, float) and math.isinf(value) and "inf" not in node.value
            if value is not None and not overflown and self._holds(value):
                return value
        raise refused(node, f"expected {self.words}, found {_found(node)}", remedy=f"write {self.words}")

    def schema(self) -> Schema:
        return {"type": self.json} | (self.limits.schema if self.limits else {})

    def _holds(self, value: Any) -> bool:
        return self.limits is None or self.limits.hold(value)


_NUMBER = r"[-+]?((\d+\.?\d*|\.\d+)([eE][-+]?\d+)?|\.inf)"

_SCALARS: Mapping[Any, Form] = {
    bool: _Scalar("true or false", "true|false", "boolean", bool, bool, lambda text: text == "true"),
    int: _Scalar("a whole number", r"[-+]?\d{1,18}", "integer", Integral, int, int),
    float: _Scalar("a number", _NUMBER, "number", Real, float, lambda text: float(text.replace(".inf", "inf"))),
    str: _Scalar("a text", ".*", "string", str, str, str),
}


@dataclass(frozen=True)
class _Nothing(Form):
    words = "null"

    def plain(self, value: Any) -> Any:
        if value is not None:
            raise TypeError(f"expected None, found {value!r}")

    def read(self, node: yaml.Node) -> Any:
        if not _is_null(node):
            raise refused(node, f"expected null, found {_found(node)}")

    def schema(self) -> Schema:
        return {"type": "null"}


@dataclass(frozen=True)
class _OneOf(Form):
    kind: type[enum.Enum]

    def plain(self, value: Any) -> Any:
        return self.kind(value).value

    def read(self, node: yaml.Node) -> Any:
        values = [item.value for item in self.kind]
        if not isinstance(node, yaml.ScalarNode) or node.value not in values:
            fact = f"expected a {self.kind.__name__.lower()}, found {_found(node)}"
            cause = did_you_mean(node.value, values) if isinstance(node, yaml.ScalarNode) else ""
            raise refused(node, fact, cause, f"one of {', '.join(values)}")
        return self.kind(node.value)

    def schema(self) -> Schema:
        return {"enum": [item.value for item in self.kind]}


@dataclass(frozen=True)
class _Either(Form):
    """The first arm that fits; None comes first."""

    arms: tuple[Form, ...]

    def plain(self, value: Any) -> Any:
        for arm in self.arms[:-1]:
            with contextlib.suppress(TypeError, ValueError):
                return arm.plain(value)
        return self.arms[-1].plain(value)

    def read(self, node: yaml.Node) -> Any:
        for arm in self.arms[:-1]:
            with contextlib.suppress(OptionError):
                return arm.read(node)
        try:
            return self.arms[-1].read(node)
        except OptionError as error:
            words = " or ".join(arm.words for arm in self.arms if isinstance(arm, _Scalar))
            if not all(isinstance(arm, _Scalar) for arm in self.arms):
                raise
            raise refused(node, f"expected {words}, found {_found(node)}", remedy=f"write {words}") from error

    def schema(self) -> Schema:
        return {"anyOf": [arm.schema() for arm in self.arms]}


@dataclass(frozen=True)
class _List(Form):
    item: Form

    def plain(self, value: Any) -> Any:
        if not isinstance(value, tuple | list):
            raise TypeError(f"expected a tuple, found {value!r}")
        return [self.item.plain(item) for item in value]

    def read(self, node: yaml.Node) -> Any:
        if not isinstance(node, yaml.SequenceNode):
            raise refused(node, f"expected a list, found {_found(node)}", remedy="write it like [a, b]")
        return tuple(self.item.read(item) for item in node.value)

    def schema(self) -> Schema:
        return {"type": "array", "items": self.item.schema()}


@dataclass(frozen=True)
class _Row(Form):
    items: tuple[Form, ...]

    def plain(self, value: Any) -> Any:
        return [item.plain(part) for item, part in zip(self.items, value, strict=True)]

    def read(self, node: yaml.Node) -> Any:
        count = len(self.items)
        if not isinstance(node, yaml.SequenceNode) or len(node.value) != count:
            raise refused(node, f"expected a list of {count}, found {_found(node)}", remedy=f"give {count} values")
        return tuple(item.read(part) for item, part in zip(self.items, node.value, strict=True))

    def schema(self) -> Schema:
        items = [item.schema() for item in self.items]
        return {"type": "array", "prefixItems": items, "minItems": len(items), "maxItems": len(items)}


@dataclass(frozen=True)
class _ByName(Form):
    item: Form

    def plain(self, value: Any) -> Any:
        plain: dict[str, Any] = {}
        for name, item in value:
            if name in plain:
                raise ValueError(f"'{name}' is there twice")
            try:
                plain[str(name)] = self.item.plain(item)
            except (TypeError, ValueError) as error:
                raise type(error)(f"'{name}': {error}") from error
        return plain

    def read(self, node: yaml.Node) -> Any:
        return tuple((name, self.item.read(value)) for name, _, value in entries(node, "names and their values"))

    def schema(self) -> Schema:
        return {"type": "object", "additionalProperties": self.item.schema()}


@dataclass(frozen=True)
class Settings(Form):
    """A dataclass by its fields; those that are not named keep their defaults."""

    kind: Any

    def plain(self, value: Any) -> dict[str, Any]:
        """All fields, also those at their defaults, which may change."""
        plain: dict[str, Any] = {}
        if not isinstance(value, self.kind):
            raise TypeError(f"expected a {self.kind.__name__}, found {value!r}")
        for name, shape in self._forms().items():
            try:
                plain[name] = shape.plain(getattr(value, name))
            except (TypeError, ValueError) as error:
                raise OptionError(f"setting '{name}' of {self._name}: {error}", setting=(name,)) from error
        return plain

    def read(self, node: yaml.Node) -> Any:
        """An instance."""
        shapes, values = self._forms(), {}
        for name, key, value in entries(node, f"the settings of {self._name}"):
            if name not in shapes:
                raise refused(
                    key,
                    f"there is no setting '{name}' of {self._name}",
                    did_you_mean(name, shapes),
                    f"one of {', '.join(shapes)}" if shapes else "it has none",
                )
            values[name] = shapes[name].read(value)
        return self.build(node, values)

    def build(self, node: yaml.Node, values: Mapping[str, Any]) -> Any:
        """An instance of values; errors name the node, or that of the setting which they are about.

        Raises:
            OptionError: the values make no sense together.
        """
        try:
            return self.kind(**values)
        except OptionError as error:
            raise error.at(place(_inside(node, error.setting))) from error
        except (TypeError, ValueError) as error:
            raise refused(node, f"{self._name} does not take these settings: {error}") from error

    def schema(self) -> Schema:
        """With defaults, and descriptions from the docstring."""
        properties = {}
        said = _described(self.kind)
        for field in dataclasses.fields(self.kind):
            shape = self._forms()[field.name]
            properties[field.name] = shape.schema()
            if field.name in said:
                properties[field.name]["description"] = said[field.name]
            if field.default is not dataclasses.MISSING:
                properties[field.name]["default"] = shape.plain(field.default)
        return {"type": "object", "properties": properties, "additionalProperties": False}

    @property
    def _name(self) -> str:
        name: str = getattr(self.kind, "name", self.kind.__name__.lower())
        return name

    @functools.cache  # noqa: B019  (of classes)
    def _forms(self) -> Mapping[str, Form]:
        """The form of each setting.

        Raises:
            OptionError: a setting that no recipe can hold.
        """
        try:
            hints = typing.get_type_hints(self.kind, include_extras=True)
            return {field.name: form(hints[field.name]) for field in dataclasses.fields(self.kind) if field.init}
        except OptionError as error:
            raise OptionError(f"{self._name}: {error.fact}", error.cause, error.remedy) from error
        except (NameError, TypeError) as error:
            raise OptionError(f"the settings of {self._name} have no types that can be read: {error}") from error


def _described(kind: type) -> dict[str, str]:
    """What the docstring says of each attribute."""
    doc = inspect.cleandoc(kind.__doc__ or "")
    found = re.findall(r"^ {4}(\w+(?:, \w+)*): (.*(?:\n {8,}.*)*)", doc, re.MULTILINE)
    return {name: " ".join(text.split()) for names, text in found for name in names.split(", ")}
