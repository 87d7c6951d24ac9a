"""Passes of others may do anything: what breaks the contract is told with their name, and the rest goes on without."""

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any, ClassVar

import onnx_ir as ir
import pytest

import onnxcomp
from onnxcomp import registry
from onnxcomp.core import Change, Context, Option, Outcome, Parts, Pass
from onnxcomp.errors import OnnxcompError
from onnxcomp.recipe import Recipe
from tests.commands import run
from tests.lab import Lab, lab, network, trial

__all__ = ["lab"]

LAYER = "g0"


@dataclass(frozen=True)
class Theirs(Pass):
    """Keeps the contract."""

    name: ClassVar[str] = "theirs"
    summary: ClassVar[str] = "for tests"
    parts: Parts = ()

    def apply(self, model: ir.Model, context: Context) -> Outcome:
        return Outcome(model, (Change(LAYER, "nothing"),))

    def options(self, model: ir.Model, context: Context) -> Iterator[Option]:
        yield Option(LAYER, 1, 0.01, 0, 0.5)


def theirs(**methods: Any) -> Theirs:
    """One that does otherwise."""
    kind: type[Theirs] = type("Other", (Theirs,), {"__module__": __name__, **methods})
    return kind()


def gives(value: object) -> Callable[..., Any]:
    return lambda *_: value


def fails(*_: object) -> Any:
    raise ValueError("an odd one\nand more")


def told(call: Callable[[], object]) -> str:
    """What is said, with the name of the pass and of its module."""
    with pytest.raises(OnnxcompError) as caught:
        call()
    assert caught.value.exit_code == 1
    assert __name__ in caught.value.cause
    assert caught.value.fact.startswith("pass 'theirs' ")
    return caught.value.fact.removeprefix("pass 'theirs' ")


# -- the contract -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "fact"),
    [
        (None, "gave something of type NoneType, not Outcome"),
        (Outcome(None), "gave something of type NoneType, not Model"),  # type: ignore[arg-type]
        (Outcome(network(), ("g0",)), "gave something of type str, not Change"),  # type: ignore[arg-type]
        (Outcome(network(), (), (Change("g0", "left"),)), "gave something of type Change, not Skip"),  # type: ignore[arg-type]
        (Outcome(network(), None), "raised TypeError"),  # type: ignore[arg-type]
        (Outcome(network(["g0"])), "changed the model's inputs or outputs"),
    ],
)
def test_what_is_no_outcome_of_the_model_is_refused(given: object, fact: str) -> None:
    assert told(lambda: theirs(apply=gives(given))(network())).startswith(fact)


@pytest.mark.parametrize(
    ("option", "fact"),
    [
        ((LAYER, 1, 0.1, 0), "gave something of type tuple, not Option"),
        (Option(LAYER, 1, float("nan"), 0), "offers what cannot be: Option(part='g0'"),
        (Option(LAYER, 1, -0.1, 0), "offers what cannot be"),
        (Option(LAYER, 1, 0.1, -1), "offers what cannot be"),
        (Option(LAYER, 1, 0.1, 0, float("inf")), "offers what cannot be"),
        (Option(LAYER, 1, "0.1", 0), "raised TypeError"),  # type: ignore[arg-type]
        (Option(None, 1, 0.1, 0), "gave something of type NoneType, not str"),  # type: ignore[arg-type]
        (Option(LAYER, [1], 0.1, 0), "gave something of type list, not int | float | str"),  # type: ignore[arg-type]
    ],
)
def test_what_is_no_option_is_refused(option: Any, fact: str) -> None:
    technique = theirs(options=lambda *_: iter([Option(LAYER, 1, 0.1, 0), option]))
    assert told(lambda: technique.offered(network(), Context())).startswith(fact)


def test_what_is_no_iterator_of_options_is_refused() -> None:
    assert told(lambda: theirs(options=gives(None)).offered(network(), Context())).startswith("raised TypeError")


def test_what_keeps_the_contract_is_not_refused() -> None:
    technique = theirs()
    assert technique(network()).changes == (Change(LAYER, "nothing"),)
    options = technique.offered(network(), Context())
    assert [option.part for option in options] == [LAYER]
    assert technique.taken(options) == replace(technique, parts=((LAYER, 1),))


@pytest.mark.parametrize(
    ("taking", "fact"),
    [
        (fails, "raised ValueError: an odd one"),
        (gives(None), "gave something of type NoneType, not Other"),
    ],
)
def test_what_takes_no_options_is_refused(taking: Any, fact: str) -> None:
    assert told(lambda: theirs(taking=taking).taken([Option(LAYER, 1, 0.1, 0)])).startswith(fact)


@pytest.mark.parametrize(
    ("methods", "fact"),
    [
        ({"settled": fails}, "raised ValueError: an odd one"),
        ({"settled": gives(None)}, "gave something of type NoneType, not Pass"),
        ({"named_nodes": fails}, "raised ValueError: an odd one"),
        ({"named_nodes": gives(None)}, "raised AttributeError"),
    ],
)
def test_a_recipe_with_it_says_who_is_at_fault(methods: dict[str, Any], fact: str) -> None:
    assert told(lambda: onnxcomp.apply(network(), recipe=Recipe((theirs(**methods),)))).startswith(fact)


# -- the search -------------------------------------------------------------------------------------------------------


def test_a_search_with_one_that_fails_goes_on(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    known = {**registry.passes(), "theirs": type(theirs(apply=gives(None)))}
    monkeypatch.setattr(registry, "_found", lambda: (known, ()))
    result = lab.optimize(passes=["simplify", "quantize-static", "theirs"])
    assert trial(result, "theirs").verdict == "not possible: pass 'theirs' gave something of type NoneType, not Outcome"
    assert result.report.result.speedup is not None
    assert result.report.result.speedup > 1


# -- finding them -----------------------------------------------------------------------------------------------------

MODULE = """
from dataclasses import dataclass, field
from typing import ClassVar
from onnxcomp.core import Outcome, Pass

print("a module that talks")

class Base(Pass):
    summary: ClassVar[str] = "for tests"
    def apply(self, model, context):
        return Outcome(model)

@dataclass(frozen=True)
class Good(Base):
    name: ClassVar[str] = "good"

@dataclass
class Open(Base):
    name: ClassVar[str] = "open"

@dataclass(frozen=True)
class Listed(Base):
    name: ClassVar[str] = "listed"
    nodes: tuple[str, ...] = field(default_factory=list)

@dataclass(frozen=True)
class Derived(Base):
    name: ClassVar[str] = "derived"
    twice: int = field(default=2, init=False)
"""


@pytest.fixture
def theirs_talks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module of passes that is installed."""
    (tmp_path / "theirs_talks.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "theirs_talks", raising=False)
    point = EntryPoint("point", "theirs_talks", registry.ENTRY_POINTS)
    monkeypatch.setattr(registry, "entry_points", lambda **_: [point])
    monkeypatch.setattr(registry, "_found", registry._found.__wrapped__)


@pytest.mark.usefixtures("theirs_talks")
def test_passes_that_their_settings_do_not_tell_are_left_out() -> None:
    assert "good" in registry.passes()
    assert {"open", "listed", "derived"}.isdisjoint(registry.passes())
    problems = " ".join(registry.unusable())
    assert "'open' is no frozen dataclass" in problems
    assert "'derived' has fields that are no settings: twice" in problems
    assert "'listed' cannot be made with its defaults: TypeError: unhashable type: 'list'" in problems


@pytest.mark.usefixtures("theirs_talks")
def test_what_they_print_when_imported_is_no_part_of_the_answer() -> None:
    done = run("passes", "--schema")
    assert "good" in json.loads(done.stdout)["properties"]["passes"]["items"]["anyOf"][0]["enum"]
    assert "a module that talks" in done.stderr
