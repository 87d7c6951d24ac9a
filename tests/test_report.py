"""Reports as JSON after the schema, and as text that says what happened."""

import dataclasses
import json
import math
import re
import time
from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from rich.console import Console

from onnxcomp import console, report, wording
from onnxcomp.budget import Budget
from onnxcomp.core import Change, Skip
from onnxcomp.explanation import Explanation
from onnxcomp.report import Figures, FrozenRow, GroupRow, Inspection, Report, Step, Trial
from onnxcomp.verification import Verification

SCHEMA = json.loads((Path(__file__).parents[1] / "docs" / "report.schema.json").read_text())

ENVIRONMENT: dict[str, str | int] = {"onnxruntime": "1.0", "provider": "CPUExecutionProvider", "threads": 1, "batch": 1}

FULL = Report(
    source="a.onnx",
    output="b.onnx",
    fingerprint="00",
    environment=ENVIRONMENT,
    protocol="medians",
    metric="accuracy",
    data="40 samples",
    budget=Budget(max_drop=0.01),
    met=True,
    unmet=(),
    original=Figures(4000, 2e-3, (1.9e-3, 2.1e-3), 1.0, 0.99, (0.98, 1.0), 0.0),
    result=Figures(1000, 1e-3, (0.9e-3, 1.1e-3), 2.0, 0.985, (0.97, 1.0), 0.005, None, (1.9, 2.25), (-0.002, 0.012)),
    steps=(Step("Quantize(bits=8)", (Change("conv", "int8"),), (Skip("gemm", "no kernel"),)),),
    trials=(Trial("fp16", Figures(2000, drop=math.inf), "slower"),),
    notes=("a note",),
    recipe="passes:\n- quantize-static: {keep: [gemm]}\n",
)


def shown(document: report.Document, *, verbose: bool = False) -> str:
    page = Console(file=StringIO(), width=500, color_system=None, markup=False, highlight=False)
    with page.capture() as text:
        page.print(*console.render(document, verbose), sep="\n")
    return text.get()


def line_with(text: str, start: str) -> str:
    return next(line for line in text.splitlines() if line.lstrip().startswith(start))


def changed(**changes: Any) -> str:
    return shown(dataclasses.replace(FULL, **changes))


def test_json_follows_the_schema() -> None:
    plain = json.loads(json.dumps(FULL.to_json(), allow_nan=False))
    jsonschema.validate(plain, SCHEMA)
    assert plain["kind"] == "report"
    assert plain["trials"][0]["figures"]["drop"] == "Infinity"
    assert plain["steps"][0]["changes"] == [{"node": "conv", "what": "int8"}]


def test_the_schema_refuses_what_it_does_not_know() -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(FULL.to_json() | {"more": 1}, SCHEMA)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(FULL.to_json() | {"met": "yes"}, SCHEMA)


@pytest.mark.parametrize("kind", [Report, report.Benchmark, report.Evaluation, Inspection, Explanation, Verification])
def test_the_schema_names_every_field(kind: type[report.Document]) -> None:
    assert dataclasses.is_dataclass(kind)
    fields = {field.name for field in dataclasses.fields(kind)}
    assert set(SCHEMA["$defs"][kind.kind]["required"]) == fields | {"schema", "kind"}


def test_the_headline_gives_before_after_and_ratio() -> None:
    text = shown(FULL)
    assert line_with(text, "size").split("  ")[-1].strip() == "4.00x smaller (25%)"
    assert "2.00 ms [1.90 ms, 2.10 ms]" in line_with(text, "latency")
    assert "2.00x faster" in line_with(text, "latency")
    assert line_with(text, "accuracy").endswith("0.50 points worse")
    assert "medians" in line_with(text, "Latency:")
    assert line_with(text, "Within the budget").endswith("a drop of at most 1 points")
    assert "1 x int8" in text
    assert "1 left: no kernel (gemm)" in text
    assert "fp16" in text
    assert "- a note" in text


def test_a_broken_budget_is_said_loudly() -> None:
    text = changed(met=False, unmet=("too slow",))
    assert line_with(text, "NOT within") == "NOT within the budget: too slow"
    assert "Within the budget" not in text


def test_worse_is_said_as_worse() -> None:
    text = changed(result=Figures(8000, 4e-3, (4e-3, 4e-3), 0.5, 1.0, None, -0.01))
    assert "2.00x larger (200%)" in text
    assert "2.00x slower" in text
    assert "1.00 points better" in text


def test_what_was_not_measured_is_left_out() -> None:
    text = changed(original=Figures(10), result=Figures(10), metric="", trials=())
    assert "latency" not in text
    assert "tried" not in text


def test_many_nodes_become_counts_unless_verbose() -> None:
    changes = tuple(Change(f"node{i}", f"joined with '{i}'") for i in range(500))
    skips = tuple(Skip(f"left{i}", f"reason {i}") for i in range(20))
    many = dataclasses.replace(FULL, steps=(Step("P(x=1)", changes, skips),))
    text = shown(many)
    assert "500 x joined with '...'" in text
    assert "node7" not in text
    assert "12 more, shown by -v" in text
    everything = shown(many, verbose=True)
    assert "P(x=1)" in everything
    assert all(f"node{i} " in everything and f"joined with '{i}'" in everything for i in range(500))


def inspected(groups: Sequence[GroupRow], frozen: Sequence[FrozenRow], *, verbose: bool = False) -> str:
    plain = Inspection("a.onnx", 17, (), (), 1, 0, 0, 0, (), ENVIRONMENT, "", (), tuple(groups), tuple(frozen))
    jsonschema.validate(json.loads(json.dumps(plain.to_json())), SCHEMA)
    return shown(plain, verbose=verbose)


def test_groups_are_short_unless_verbose() -> None:
    crossing = ("LayerNormalization 'first'", "LayerNormalization 'second'", "Softmax 'third'")
    made_by = tuple(f"/net/self/{name}/MatMul" for name in ("query", "key", "value", "more"))
    group = GroupRow(made_by[0], 12, 32, made_by, ("/net/output/MatMul",), 26, crossing)
    unread = GroupRow("/a/Gather", 5, 1, ("/a/Gather", "/b/Conv"), (), 3, ())
    short = inspected([group, unread], [])
    assert re.split(" {2,}", line_with(short, "/net")) == [
        "/net/self/query/MatMul",
        "12 x 32",
        "4: .../self/query/MatMul, .../self/key/MatMul, .../self/value/MatMul, ...",
        ".../output/MatMul",
        "26",
        "2 LayerNormalization, 1 Softmax",
    ]
    row = re.split(" {2,}", line_with(short, "/a/Gather").rstrip())
    assert row == ["/a/Gather", "5", "2: /a/Gather, /b/Conv", "-", "3"]
    assert "cannot go" not in short
    everything = inspected([group], [], verbose=True)
    assert "4: " + ", ".join(made_by) in everything
    assert "LayerNormalization 'first', LayerNormalization 'second', Softmax 'third'" in everything


def test_frozen_layers_stand_under_their_reason_unless_verbose() -> None:
    frozen = [FrozenRow(f"conv{i}", f"'out{i}' is an output of the model") for i in range(5)]
    frozen.append(FrozenRow("gemm", "it makes only one channel"))
    short = inspected([], frozen)
    assert "5 x '...' is an output of the model (conv0, conv1, conv2, ...)" in short
    assert "1 x it makes only one channel (gemm)" in short
    everything = inspected([], frozen, verbose=True)
    assert all(re.search(f"^{row.name} +{row.reason}", everything, re.MULTILINE) for row in frozen)


def test_names_are_neither_markup_nor_escape_codes() -> None:
    text = changed(steps=(Step("P()", (), (Skip("[bold]x[/bold]\x1b[31m", "why [red]"),)),))
    assert "why [red] ([bold]x[/bold]\\x1b[31m)" in text
    assert "\x1b" not in text


def test_progress_shows_on_a_terminal_and_goes_when_done(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with console.Terminal().progress() as progress:
        progress(1, 2, "calibrating")
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(Console, "is_terminal", True)
    with console.Terminal(quiet=True).progress() as progress:
        progress(1, 2, "calibrating")
    assert capsys.readouterr().err == ""
    with console.Terminal().progress() as progress:
        progress(1, 2, "calibrating")
        seen = capsys.readouterr().err
        assert "calibrating" in seen
        assert "1/2" in seen
        progress(2, 2, "calibrating")
        assert "calibrating" not in capsys.readouterr().err
        progress(1, 3, "scoring [x]")
        time.sleep(0.11)
        progress(2, 3, "scoring [x]")
        assert "scoring [x]" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("form", "value", "text"),
    [
        (lambda value: wording.ratio(value, "faster", "slower", (0.75, 1.25)), 1.0, "1.00x faster [0.75x, 1.25x]"),
        (lambda value: wording.ratio(value, "faster", "slower", (0.5, 1.0)), 0.8, "1.25x slower [1.00x, 2.00x]"),
        (wording.byte_count, 999, "999 B"),
        (wording.byte_count, 999_999, "1.00 MB"),
        (wording.byte_count, 12_345_678, "12.3 MB"),
        (wording.seconds, 0.00012345, "123 us"),
        (wording.seconds, 0.0015, "1.50 ms"),
        (wording.seconds, 0.9999, "1.00 s"),
        (wording.count, 0, "0"),
        (wording.count, 105e6, "105 M"),
    ],
)
def test_numbers_have_three_digits_and_a_unit(form: Any, value: float, text: str) -> None:
    assert form(value) == text


def test_scores_are_in_the_metrics_unit() -> None:
    assert wording.score("accuracy:logits", 0.5) == "50.00%"
    assert wording.score("relative-error", 0.01234567) == "0.01235"
    assert wording.loss("sqnr", 3.0) == "3 worse"
    assert wording.loss("sqnr", 0.0) == "no loss"


def test_a_budget_in_words_names_every_limit() -> None:
    budget = Budget(0.02, 0.005, 2.0, 10**7, 0.25)
    assert wording.budget_in_words(budget, "mse") == (
        "a drop of at most 0.02, at most 5.00 ms, at least 2x faster, at most 10.0 MB, at most 25% of the size"
    )
    assert wording.budget_in_words(Budget(), "mse") == ""
