"""Every pass by name: whatever module lies in `onnxcomp.passes` counts, and what other distributions offer.

Those name a pass, or a module of passes, as an entry point of the group `onnxcomp.passes`. One that cannot be used is
left out with its reason, and takes nothing from the others.
"""

import contextlib
import dataclasses
import functools
import importlib
import inspect
import pkgutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import EntryPoint, entry_points
from types import ModuleType
from typing import Any

import onnxcomp.passes
from onnxcomp.core import Pass
from onnxcomp.errors import OptionError, did_you_mean
from onnxcomp.settings import Settings

GROUPS = {
    "clean-up": ("simplify", "unfuse"),
    "quantize": ("equalize", "smooth", "quantize-static", "quantize-dynamic", "quantize-weights", "convert-float"),
}
"""Names that stand for several passes."""

ENTRY_POINTS = "onnxcomp.passes"
"""The group by which other distributions offer theirs."""


def passes() -> Mapping[str, type[Pass]]:
    """The passes by name, in alphabetical order."""
    return _found()[0]


def storing() -> frozenset[str]:
    """Names of those that only store weights in fewer bytes."""
    return frozenset(name for name, kind in passes().items() if kind.stores)


def unusable() -> Sequence[str]:
    """What other distributions offer that cannot be used, and why."""
    return _found()[1]


@functools.cache
def _found() -> tuple[Mapping[str, type[Pass]], Sequence[str]]:
    found: dict[str, type[Pass]] = {}
    for module in pkgutil.iter_modules(onnxcomp.passes.__path__, "onnxcomp.passes."):
        found |= {item.name: item for item in _in_module(importlib.import_module(module.name))}
    problems = []
    points = entry_points(group=ENTRY_POINTS)
    for point in sorted(set(points), key=lambda point: (_distribution(point), point.name, point.value)):
        where = f"entry point '{point.name} = {point.value}' of the distribution '{_distribution(point)}'"
        try:
            offered = list(_offered(point))
        except (Exception, SystemExit) as error:  # noqa: BLE001  (whatever code of others does when it is imported)
            problems.append(f"{where} cannot be imported: {type(error).__name__}: {error}")
            continue
        if not offered:
            problems.append(f"{where} is neither a pass nor a module of passes")
        for item in offered:
            if problem := _problem(item, found):
                problems.append(f"{where}: {problem}")
            else:
                found[item.name] = item
    return dict(sorted(found.items())), tuple(problems)


def _distribution(point: EntryPoint) -> str:
    """Its name, or where it lies if its metadata are broken."""
    try:
        name: str | None = None if point.dist is None else point.dist.metadata["Name"]
    except Exception:  # noqa: BLE001  (what is raised depends on the version of Python)
        name = None
    return name or str(getattr(point.dist, "_path", "unknown"))


def _offered(point: EntryPoint) -> Iterator[type[Pass]]:
    with contextlib.redirect_stdout(sys.stderr):  # what it prints when it is imported is no part of the answer
        item = point.load()
    if isinstance(item, ModuleType):
        yield from _in_module(item)
    elif _is_pass(item):
        yield item


def _in_module(module: ModuleType) -> Iterator[type[Pass]]:
    """The passes that a module defines, or takes from modules below it."""
    for item in vars(module).values():
        if _is_pass(item) and f"{item.__module__}.".startswith(f"{module.__name__}."):
            yield item


def _is_pass(item: Any) -> bool:
    return isinstance(item, type) and issubclass(item, Pass) and not inspect.isabstract(item)


def _problem(kind: type[Pass], found: Mapping[str, type[Pass]]) -> str:
    """Why a pass of others cannot be used; empty if it can."""
    name = getattr(kind, "name", None)
    if not isinstance(name, str) or not isinstance(getattr(kind, "summary", None), str):
        return f"'{kind.__name__}' has no name or no summary"
    if name in found or name in GROUPS:
        return f"the name '{name}' is already taken"
    if not (dataclasses.is_dataclass(kind) and kind.__dataclass_params__.frozen):
        return f"'{name}' is no frozen dataclass"
    if derived := [field.name for field in dataclasses.fields(kind) if not field.init]:
        return f"'{name}' has fields that are no settings: {', '.join(derived)}"
    try:
        default = kind()
        Settings(kind).plain(default)
        hash(default)
    except OptionError as error:
        return error.fact
    except Exception as error:  # noqa: BLE001  (code of others)
        return f"'{name}' cannot be made with its defaults: {type(error).__name__}: {error}"
    return ""


def named(name: str) -> type[Pass]:
    """The pass of that name.

    Raises:
        OptionError: there is none, or several have it together.
    """
    if name in GROUPS:
        raise OptionError(
            f"'{name}' is a group of passes, no pass", remedy=f"name those meant: {', '.join(GROUPS[name])}"
        )
    if name not in passes():
        raise unknown(name, passes())
    return passes()[name]


def unknown(name: str, known: Mapping[str, object]) -> OptionError:
    """The error that there is no pass of a name."""
    broken = "; ".join(unusable())
    cause = did_you_mean(name, known) or (f"not usable here: {broken}" if broken else "")
    return OptionError(f"there is no pass '{name}'", cause, f"one of {', '.join(known)}")


def resolve(names: Sequence[str]) -> frozenset[str]:
    """Names of passes, groups spelt out.

    Raises:
        OptionError: no such pass.
    """
    chosen: set[str] = set()
    for name in names:
        if name not in passes() and name not in GROUPS:
            raise unknown(name, {**GROUPS, **passes()})
        chosen.update(GROUPS.get(name, (name,)))
    return frozenset(chosen & set(passes()))
