"""Recipes: exact round trips of every setting of every pass, and refusals that point at the place."""

import dataclasses
import json
import math
import re
import typing
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, ClassVar

import jsonschema
import pytest
import yaml
from hypothesis import HealthCheck, assume, example, find, given
from hypothesis import settings as effort
from hypothesis import strategies as st

from onnxcomp import recipe as recipes
from onnxcomp import registry
from onnxcomp.core import Choice, Context, Outcome, Pass
from onnxcomp.errors import OptionError
from onnxcomp.passes.prune import Prune
from onnxcomp.passes.quantize_static import QuantizeStatic, Range
from onnxcomp.passes.share import Share
from onnxcomp.passes.simplify import Simplify
from onnxcomp.recipe import Recipe
from onnxcomp.weights import Rounding
from onnxcomp.widths import Cost

ROOT = Path(__file__).parents[1]
SCHEMA = json.loads((ROOT / "docs" / "recipe.schema.json").read_text())
NAMES = ["on", "no", "12", "1e3", "~", "null", "", "a b", "#x", "a: b", "[x]", "é", "\n", "\x85", "'", '"', "/a/b.c-d"]


class Colour(Choice):
    RED = "on"
    GREEN = "green"


@dataclasses.dataclass(frozen=True)
class Everything(Pass):
    """Settings of every form.

    Attributes:
        number: what is said of it.
    """

    name: ClassVar[str] = "everything"
    summary: ClassVar[str] = "all forms of settings"

    number: float = 1.0
    text: str = "x"
    perhaps: str | None = None
    colour: Colour = Colour.RED
    rows: tuple[tuple[int, ...], ...] = ()
    pair: tuple[int, str] = (1, "a")
    bits: tuple[tuple[str, int], ...] = ()
    forms: tuple[tuple[str, Rounding], ...] = ()
    any_of: int | float | tuple[int, ...] | None = None

    def apply(self, model: Any, context: Context) -> Outcome:
        return Outcome(model)


@pytest.fixture(autouse=True)
def everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass with all forms of settings beside the others."""
    found = {**registry.passes(), "everything": Everything}
    monkeypatch.setattr(registry, "passes", lambda: found)


def values(hint: Any) -> st.SearchStrategy[Any]:
    """Values of a setting by its type hint."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        pattern = inner[1].schema.get("pattern")
        return st.from_regex(re.compile(pattern, re.ASCII)) if pattern else values(inner[0])
    if hint is bool:
        return st.booleans()
    if hint is int:
        return st.integers(0, 20)
    if hint is float:
        return st.floats(0, 1) | st.floats(allow_nan=False)
    if hint is str:
        return st.sampled_from(NAMES) | st.text()
    if isinstance(hint, type) and issubclass(hint, StrEnum):
        return st.sampled_from(list(hint))
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return instances(hint)
    if origin is tuple and inner[-1] is Ellipsis:
        pair = typing.get_args(inner[0])
        by_name = len(pair) == 2 and pair[0] is str
        lists = st.lists(values(inner[0]), max_size=5, unique_by=(lambda item: item[0]) if by_name else None)
        return lists.map(tuple)
    if origin is tuple:
        return st.tuples(*map(values, inner))
    if hint is type(None):
        return st.none()
    return st.one_of(*map(values, inner))


@st.composite
def instances(draw: st.DrawFn, kind: type[Any]) -> Any:
    hints = typing.get_type_hints(kind, include_extras=True)
    given: dict[str, Any] = {}
    for field in dataclasses.fields(kind):
        if draw(st.booleans()):
            tried = given | {field.name: draw(values(hints[field.name]))}
            try:
                kind(**tried)
            except OptionError:
                continue  # out of range, perhaps only with the others
            given = tried
    return kind(**given)


def passes_of_every_kind() -> st.SearchStrategy[Pass]:
    kinds: list[Any] = [*registry.passes().values(), Everything]
    return st.one_of(*map(instances, kinds))


@given(
    st.lists(passes_of_every_kind(), max_size=4),
    st.integers(0, 2**40),
    st.none() | st.sampled_from(["on", "12", "^a|b$", "", "null"]),
)
@effort(max_examples=60, suppress_health_check=list(HealthCheck))
@example([QuantizeStatic(keep=tuple(NAMES))], 0, "on")
@example([Everything(bits=tuple((name, 3) for name in NAMES), number=1e-300)], 1, None)
def test_a_recipe_comes_back_as_it_was(passes: list[Pass], seed: int, exclude: str | None) -> None:
    recipe = Recipe(tuple(passes), seed, exclude)
    text = recipe.to_yaml()
    again = Recipe.from_yaml(text)
    assert again == recipe
    assert again.to_yaml() == text
    if not any(isinstance(item, Everything) for item in passes):
        jsonschema.validate(yaml.safe_load(text), SCHEMA)  # so another reader takes texts and numbers for the same


@pytest.mark.parametrize("name", registry.passes())
def test_every_setting_comes_back_away_from_its_default(name: str) -> None:
    """One by one, so that none is missed by chance."""
    kind = registry.passes()[name]
    usual = kind()
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        other = _another(usual, field.name, typing.get_type_hints(kind, include_extras=True)[field.name])
        again = Recipe.from_yaml(Recipe((other,)).to_yaml()).passes[0]
        assert getattr(again, field.name) == getattr(other, field.name) != getattr(usual, field.name)


def _another(usual: Any, name: str, hint: Any) -> Any:
    """The pass with some other value of one setting."""

    def fits(value: Any) -> bool:
        try:
            return bool(getattr(dataclasses.replace(usual, **{name: value}), name) != getattr(usual, name))
        except OptionError:
            return False

    most = effort(max_examples=2000, database=None)
    return dataclasses.replace(usual, **{name: find(values(hint), fits, settings=most)})


BY_HAND = """
onnxcomp: 1            # version of the recipe format
seed: 3
exclude: "lm_head"
passes:
- simplify
- prune: {remains: 7e-1, cost: latency, multiple: 16}
- quantize-static:
    range: minmax
    rounding: {sweeps: 2}
    keep: [on, 12, 1e3, "no", ~]
- share:
"""


def test_a_recipe_by_hand_names_only_what_differs() -> None:
    static = QuantizeStatic(range=Range.MINMAX, rounding=Rounding(sweeps=2), keep=("on", "12", "1e3", "no", "~"))
    prune = Prune(remains=0.7, cost=Cost.LATENCY, multiple=16)
    assert Recipe.from_yaml(BY_HAND) == Recipe((Simplify(), prune, static, Share()), 3, "lm_head")


def test_what_is_written_holds_every_setting_and_is_readable() -> None:
    text = Recipe((Simplify(), QuantizeStatic(weight_bits=8, keep=("conv1", "no")))).to_yaml()
    assert text.splitlines() == [
        "onnxcomp: 1",
        "seed: 0",
        "passes:",
        "- simplify: {keep_overridable: false}",
        "- quantize-static:",
        "    range: mse",
        "    signed: false",
        "    weight_bits: 8",
        "    rounding: {gptq: true, sweeps: 3, bias_correction: true, search: true}",
        "    inputs_only: false",
        '    keep: [conv1, "no"]',
        "    as_gemm: []",
    ]


@pytest.mark.parametrize("text", ["1e-3", "0.001", ".001", "1.0e-03", "+1E-3"])
def test_numbers_are_numbers_where_numbers_are_wanted(text: str) -> None:
    (made,) = Recipe.from_yaml(f"onnxcomp: 1\npasses:\n- everything: {{number: {text}}}").passes
    assert made == Everything(number=0.001)


def test_infinity_is_a_number() -> None:
    assert Recipe.from_yaml(Recipe((Everything(number=-math.inf),)).to_yaml()).passes[0] == Everything(number=-math.inf)


PLACED = {
    "": (1, 1, "empty", "docs/recipes.md"),
    "# nothing": (1, 1, "empty", "docs/recipes.md"),
    "- a": (1, 1, "expected a recipe, found a list", "name: value"),
    "a: b: c": (1, 5, "not YAML: mapping values are not allowed here", "docs/recipes.md"),
    "onnxcomp: 1\npasses: [": (2, 10, "not YAML", "docs/recipes.md"),
    "a\x00b": (1, 2, "not YAML: special characters", "docs/recipes.md"),
    "passes: []": (1, 1, "without a version", "onnxcomp: 1"),
    "onnxcomp: 1": (1, 1, "without passes", "passes:"),
    "onnxcomp: 2\npasses: []": (1, 11, "version 2", "upgrade"),
    "onnxcomp: x\npasses: []": (1, 11, "expected a whole number, found 'x'", "write"),
    "onnxcomp: 1\npases: []": (2, 1, "has no 'pases'", "did you mean 'passes'"),
    "onnxcomp: 1\npasses: simplify": (2, 9, "'passes' is not a list", "`-`"),
    "onnxcomp: 1\nseed: -1\npasses: []": (2, 7, "a seed of -1", "seed"),
    "onnxcomp: 1\nexclude: '('\npasses: []": (2, 10, "not a regular expression", "exclude"),
    "onnxcomp: 1\nseed: 1\nseed: 2\npasses: []": (3, 1, "'seed' is there twice", "leave one"),
    "onnxcomp: 1\npasses: [*a]": (2, 10, "an alias", "write the value"),
    "onnxcomp: 1\npasses: &a [*a]": (2, 9, "the anchor '&a'", "remove it"),
    "onnxcomp: 1\nexclude: &a x\npasses: []": (2, 10, "the anchor '&a'", "remove it"),
    "onnxcomp: 1\npasses: !!python/object:os.system [x]": (2, 9, "python/object:os.system", "remove the tag"),
    "onnxcomp: 1\npasses: [!!binary aGk=]": (2, 10, "binary", "remove the tag"),
    "onnxcomp: 1\nseed: !x 1\npasses: []": (2, 7, "the tag '!x'", "remove the tag"),
    "[" * 5000: (1, 21, "nested too deeply", ""),
    "#" * 2**23: (1, 1, "far too long", ""),
    "? [a]\n: b": (1, 3, "expected a name, found a list", ""),
}

IN_PASSES = {
    "prun": (3, "there is no pass 'prun'", "did you mean 'prune'"),
    "[prune]": (3, "expected a pass, found a list", ""),
    "{prune: {}, share: {}}": (3, "expected one pass, found 2", "`-`"),
    "prune: 3": (10, "expected the settings of prune, found '3'", ""),
    "prune: {remain: 1}": (11, "no setting 'remain' of prune", "did you mean 'remains'"),
    "prune: {<<: {remains: 1}}": (11, "no setting '<<'", "one of"),
    "quantize": (3, "'quantize' is a group of passes", "equalize, smooth, quantize-static, quantize-dynamic"),
    "prune: {remains: 2}": (20, "expected a number above 0 and at most 1, found '2'", "write a number above 0"),
    "prune: {remains: some}": (20, "expected a number above 0 and at most 1, found 'some'", "write a number"),
    "prune: {remains: '0.5'}": (20, "expected a number above 0 and at most 1, found the text '0.5'", "write a number"),
    "prune: {remains: 1e999}": (20, "expected a number", ""),
    "prune: {remains: .nan}": (20, "expected a number", ""),
    "prune: {remains: [1]}": (20, "expected a number above 0 and at most 1, found a list", ""),
    "prune: {remains: }": (19, "expected a number above 0 and at most 1, found nothing", ""),
    "prune: {cost: flop}": (17, "expected a cost, found 'flop'", "did you mean 'flops'"),
    "prune: {cost: flops, cost: size}": (24, "'cost' is there twice", ""),
    "share: {bits: yes}": (17, "expected a whole number from 1 to 8, found 'yes'", ""),
    "share: {bits: 3.0}": (17, "expected a whole number from 1 to 8, found '3.0'", ""),
    f"share: {{bits: {'9' * 5000}}}": (17, "expected a whole number", ""),
    "share: {reconstruct: on}": (24, "expected true or false, found 'on'", "write true or false"),
    "sparsify: {block: [1]}": (21, "expected a list of 2", "give 2 values"),
    "quantize-static: {keep: conv1}": (27, "expected a list, found 'conv1'", "[a, b]"),
    "quantize-static: {rounding: {gptk: true}}": (32, "no setting 'gptk' of rounding", "'gptq'"),
    "binarize: {bases: 5}": (21, "from 1 to 4", ""),
    "binarize: {ends: 9}": (20, "from 0 to 8", ""),
    "binarize: {ternary: true, bases: 2}": (36, "ternary weights of 2 bases", "give 1 base"),
    "binarize: {parts: {a: 5}}": (25, "from 1 to 4 or a text like `ternary`, found '5'", ""),
    "equalize: {sweeps: -1}": (22, "a whole number of at least 1, found '-1'", "write a whole number of at least 1"),
    "factorize: {energy: 1}": (23, "a number above 0 and below 1, found '1'", ""),
    "factorize: {remains: 0.5, energy: 0.9}": (37, "exclude each other", "leave one of them out"),
    "factorize: {parts: {a: svd}}": (26, "a text like `svd 12` or `tucker 8 16`, found 'svd'", ""),
    "prune: {multiple: 0}": (21, "at least 1", ""),
    "prune: {rounds: 0}": (19, "at least 1", ""),
    "prune: {penalty: -1}": (20, "at least 0", ""),
    "prune: {threshold: 1, remains: 0.5}": (22, "exclude each other", "leave one of them out"),
    "prune: {parts: {a: x}}": (22, "a whole number of at least 1, found 'x'", ""),
    "prune: {parts: {a: 0}}": (22, "a whole number of at least 1, found '0'", ""),
    "prune: {branches: {a: 2}}": (25, "from 0 to 1", ""),
    "prune-depth: {remains: 0}": (26, "above 0", ""),
    "prune-depth: {parts: {a: -1}}": (28, "from 0 to 1", ""),
    "quantize-dynamic: {weight_bits: 16}": (35, "from 2 to 8, found '16'", ""),
    "quantize-static: {weight_bits: 99}": (34, "from 2 to 8, found '99'", ""),
    "quantize-static: {rounding: {sweeps: -3}}": (40, "at least 0, found '-3'", ""),
    "quantize-weights: {bits: 5}": (28, "a whole number, 4 or 8, found '5'", ""),
    "quantize-weights: {block: 48}": (29, "a power of two, 16 or more, found '48'", ""),
    "quantize-weights: {accuracy_level: 5}": (38, "from 0 to 4", ""),
    "share: {channels: 0}": (21, "at least 1", ""),
    "share: {method: hash, channels: 2}": (35, "need the method kmeans", "leave them out"),
    "share: {parts: {a: 77}}": (22, "from 1 to 8, found '77'", ""),
    "smooth: {alpha: 9}": (19, "a number from 0 to 1, found '9'", ""),
    "sparsify: {sparsity: 1}": (24, "above 0 and below 1", ""),
    "sparsify: {of: 3}": (13, "a sparsity of 0.5 of every 3", "N/M"),
    "sparsify: {sparsity: 0.4, of: 4}": (24, "a sparsity of 0.4 of every 4", "N/M"),
    "sparsify: {block: [0, 1]}": (22, "at least 1", ""),
    "sparsify: {parts: {a: x}}": (25, "a number above 0 and below 1, found 'x'", ""),
    "sparsify: {of: 4, parts: {a: 0.4}}": (32, "a sparsity of 0.4 of every 4", "N/M"),
    "everything: {bits: [a]}": (22, "expected names and their values, found a list", ""),
    "everything: {bits: {a: 1, a: 2}}": (29, "'a' is there twice", ""),
    "everything: {bits: {a: x}}": (26, "expected a whole number, found 'x'", ""),
}


@pytest.mark.parametrize("text", PLACED, ids=range(len(PLACED)))
def test_what_is_wrong_is_said_with_its_place(text: str) -> None:
    line, column, fact, remedy = PLACED[text]
    refused(text, f"r.yaml, line {line}, column {column}: ", fact, remedy)


@pytest.mark.parametrize("text", IN_PASSES, ids=range(len(IN_PASSES)))
def test_what_is_wrong_with_a_pass_is_said_with_its_place(text: str) -> None:
    column, fact, remedy = IN_PASSES[text]
    refused(f"onnxcomp: 1\npasses:\n- {text}\n", f"r.yaml, line 3, column {column}: ", fact, remedy)


def test_each_setting_is_wrong_in_its_own_line() -> None:
    text = "onnxcomp: 1\npasses:\n- prune:\n    remains: 0.5\n    multiple: 4\n    least: 7\n"
    refused(text, "r.yaml, line 6, column 12: expected a number from 0 to 1, found '7'")
    text = "onnxcomp: 1\npasses:\n- share:\n    bits: 4\n    channels: 3\n    method: hash\n"
    refused(text, "r.yaml, line 5, column 15: codebooks by channels")


def test_a_setting_beyond_its_limits_is_refused_in_python_too() -> None:
    with pytest.raises(OptionError, match="setting 'bits' of share: expected a whole number from 1 to 8, found 9"):
        Share(bits=9)
    with pytest.raises(
        OptionError, match="setting 'parts' of share: 'a': expected a whole number from 1 to 8, found 0"
    ):
        Share(parts=(("a", 0),))
    with pytest.raises(OptionError, match="setting 'sweeps' of rounding: expected a whole number of at least 0"):
        QuantizeStatic(rounding=Rounding(sweeps=-1))
    with pytest.raises(OptionError, match=r"'remains' of prune: .* above 0 and at most 1, found nan"):
        Prune(remains=math.nan)


def refused(text: str, *parts: str) -> None:
    with pytest.raises(OptionError) as caught:
        Recipe.from_yaml(text, "r.yaml")
    assert caught.value.exit_code == 2
    assert str(caught.value).startswith(parts[0])
    for part in parts:
        assert part in str(caught.value)


@given(st.text(max_size=300))
@effort(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example("onnxcomp: 1\npasses:\n- share: {bits: 0x10}")
@example("%TAG ! x\n---\nonnxcomp: 1")
@example("--- a\n--- b")
@example("!<x> {}")
@example("@")
def test_no_text_does_more_than_be_refused(text: str) -> None:
    try:
        Recipe.from_yaml(text, "r.yaml")
    except OptionError as error:
        assert re.match(r"r\.yaml, line \d+, column \d+: ", error.fact)  # noqa: PT017
    else:
        assume(False)


def test_a_setting_of_another_type_is_refused_in_python_too() -> None:
    with pytest.raises(OptionError, match="setting 'keep' of quantize-static"):
        QuantizeStatic(keep=5)  # type: ignore[arg-type]


def test_passes_that_no_recipe_can_hold_are_refused() -> None:
    @dataclasses.dataclass(frozen=True)
    class Odd(Everything):
        table: Mapping[str, int] = dataclasses.field(default_factory=dict)

    with pytest.raises(OptionError, match="everything: a recipe cannot hold a Mapping"):
        Odd()


def test_the_schema_is_the_one_of_the_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    made = recipes.schema(registry.passes())
    assert made == SCHEMA, "run: onnxcomp passes --schema > docs/recipe.schema.json"
    jsonschema.Draft202012Validator.check_schema(made)


@pytest.mark.parametrize("text", [text for text in PLACED if text.startswith("onnxcomp") and "!" not in text][3:6])
def test_the_schema_refuses_what_the_reader_refuses(text: str) -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(yaml.safe_load(text), SCHEMA)


def test_the_schema_takes_recipes_by_hand_and_names_every_setting() -> None:
    plain = yaml.safe_load(BY_HAND.replace("7e-1", "0.7").replace("on, 12, 1e3", "conv").replace(", ~", ""))
    plain["passes"][-1] = "share"
    jsonschema.validate(plain, SCHEMA)
    described = recipes.schema({"everything": Everything})["properties"]["passes"]["items"]["anyOf"][1]
    settings = described["properties"]["everything"]["properties"]
    assert settings["number"] == {"type": "number", "default": 1.0, "description": "what is said of it."}
    assert settings.keys() == {field.name for field in dataclasses.fields(Everything)}


@pytest.mark.parametrize("setting", ["sparsity: 1", "of: -1", "block: [0, 1]", "parts: {a: 0}"])
def test_the_schema_has_the_limits_of_numbers(setting: str) -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(yaml.safe_load(f"onnxcomp: 1\npasses: [sparsify: {{{setting}}}]"), SCHEMA)
