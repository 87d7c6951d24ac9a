"""Every pass by name: whatever module lies in `onnxcomp.passes` counts."""

import difflib
import functools
import importlib
import pkgutil
from collections.abc import Mapping, Sequence

import onnxcomp.passes
from onnxcomp.core import Pass
from onnxcomp.errors import OptionError

GROUPS = {
    "quantize": ("equalize", "smooth", "quantize-static", "quantize-dynamic", "quantize-weights", "convert-float")
}
"""Names that stand for several passes."""

STORING = frozenset({"binarize", "share", "sparsify"})
"""Passes that only store weights in fewer bits, upon whatever else was done."""


@functools.cache
def passes() -> Mapping[str, type[Pass]]:
    """The passes by name, in alphabetical order."""
    found = {}
    for module in pkgutil.iter_modules(onnxcomp.passes.__path__, "onnxcomp.passes."):
        for item in vars(importlib.import_module(module.name)).values():
            if isinstance(item, type) and issubclass(item, Pass) and item.__module__ == module.name:
                found[item.name] = item
    return dict(sorted(found.items()))


def named(name: str) -> type[Pass]:
    """A pass.

    Raises:
        OptionError: no such pass.
    """
    _known(name, [*passes()])
    return passes()[name]


def resolve(names: Sequence[str]) -> frozenset[str]:
    """Names of passes, groups spelt out.

    Raises:
        OptionError: no such pass.
    """
    chosen: set[str] = set()
    for name in names:
        _known(name, [*GROUPS, *passes()])
        chosen.update(GROUPS.get(name, (name,)))
    return frozenset(chosen & set(passes()))


def _known(name: str, names: Sequence[str]) -> None:
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        raise OptionError(
            f"there is no pass '{name}'",
            f"did you mean '{near[0]}'?" if near else "",
            f"one of {', '.join(names)}",
        )
