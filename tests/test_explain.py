"""What a model says of itself, and what is made of it when it says something odd."""

import base64
import dataclasses
import json
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import onnx
import pytest

import onnxcomp
from onnxcomp import model as models
from onnxcomp.core import Change, Pass, Skip
from onnxcomp.errors import ModelError
from onnxcomp.explanation import Explanation, LayerRow, explain
from onnxcomp.layers import layers
from onnxcomp.passes.factorize import Factorize
from onnxcomp.passes.prune import Prune
from onnxcomp.passes.prune_depth import PruneDepth
from onnxcomp.passes.share import Share
from onnxcomp.passes.simplify import Simplify
from onnxcomp.recipe import Recipe
from onnxcomp.record import Origin, Record, stamped
from onnxcomp.report import Figures, Step, Trial
from onnxcomp.runtime import Target
from tests.commands import mlp, run, samples, weights
from tests.lab import Lab, integers, lab, network
from tests.lab import samples as lab_samples
from tests.passes.small import context as small_context
from tests.passes.small import network as small_network
from tests.passes.test_prune_depth import joins, residual
from tests.test_report import SCHEMA, shown

__all__ = ["lab"]

RECIPE = Recipe((Simplify(), Share(bits=3)))
RECORD = Record(
    (
        Step("simplify", (Change("conv", "folded"),)),
        Step("share", (Change("conv", "8 values"), Change("gémm", "8 values")), (Skip("last", "too small"),)),
    ),
    (
        Trial("clean-up", Figures(10), "reference"),
        Trial("share", Figures(5, drop=0.01234567), "chosen"),
        Trial("fp16", Figures(6, drop=float("inf")), "failed"),
    ),
    "accuracy",
)


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A model that says how it was made."""
    wide = {"w1": np.random.default_rng(0).standard_normal((512, 8)).astype("f4"), "w2": np.ones((4, 512), "f4")}
    model = mlp(tmp_path / "wide.onnx", wide)
    path = tmp_path / "made.onnx"
    run("quantize", model, "--calib", samples(tmp_path / "d.npz"), "--exclude", "^Gemm_y$", "-o", path, "-q")
    return path


def test_a_record_comes_back() -> None:
    again = Record.unpacked(RECORD.packed(), RECIPE, "m")
    rounded = dataclasses.replace(RECORD.trials[1], figures=Figures(5, drop=0.0123))
    assert again == dataclasses.replace(RECORD, trials=(RECORD.trials[0], rounded, RECORD.trials[2]))
    assert again.packed() == RECORD.packed()


def test_explain_shows_layers_with_their_deeds_and_reasons(made: Path) -> None:
    text = run("explain", made).stdout
    assert "- quantize-static:\n      range: mse" in text
    assert re.search(r"1 x Gemm_h\n.*\n? +quantize-static: (7-bit )?int8 weights per channel, uint8 activations", text)
    assert "left by quantize-static: excluded by the user" in text
    plain = json.loads(run("explain", made, "--json", "-").stdout)
    jsonschema.validate(plain, SCHEMA)
    assert plain["kind"] == "explanation"
    assert plain["input"] == models.fingerprint(made.with_name("wide.onnx"))
    rows = {row["name"]: row for row in plain["layers"]}
    assert list(rows) == ["Gemm_h", "Relu_a", "Gemm_y"]
    assert re.fullmatch(
        "quantize-static: (7-bit )?int8 weights per channel, uint8 activations", *rows["Gemm_h"]["done"]
    )
    assert rows["Gemm_y"]["left"][-1] == "quantize-static: excluded by the user"
    assert Recipe.from_yaml(plain["recipe"]) == Origin.of(made).recipe
    assert re.search("^  Gemm_y +left by quantize-static: excluded", run("explain", made, "-v").stdout, re.MULTILINE)


def test_explain_says_what_the_search_tried_and_why_not_more(lab: Lab, tmp_path: Path) -> None:
    lab.loss = lambda model: 0.3 if "g2" in integers(model) else 0.0
    lab.order = lambda name: name == "g2"
    result = lab.optimize(source=network(), calib=lab_samples(), budget=onnxcomp.Budget(max_drop=0.1))
    explanation = explain(result.model)
    assert [t.verdict for t in explanation.trials] == [t.verdict for t in result.report.trials]
    assert [t.name for t in explanation.trials] == [t.name for t in result.report.trials]
    text = shown(explanation)
    assert re.search(r"static INT8, weights refined .* over the budget|static INT8 .* over the budget", text)
    assert "chosen" in text
    (kept,) = (row for row in explanation.layers if row.name == "g2")
    assert kept.left == ("quantize-static: kept in float: faster or more accurate so",)


def test_many_layers_stay_readable() -> None:
    rows = [LayerRow(f"/layer{i}/conv", (f"share: from 'layer{i - 1}'",), ("smooth: no outliers",)) for i in range(50)]
    rows.append(LayerRow("fc", (), ("share: too small [red]\x1b[31m",)))
    text = shown(Explanation("m.onnx", "0.1", "00", RECIPE.to_yaml(), tuple(rows)))
    assert len(text.splitlines()) < 25
    assert "50 x /layer0/conv, /layer1/conv, /layer2/conv, ..." in text
    assert "share: from '...'" in text
    assert "too small [red]\\x1b[31m" in text
    assert "tried" not in text


def test_layers_that_no_pass_treats_are_shown_and_those_that_one_made_are_not() -> None:
    cleaned, split = (
        onnxcomp.convert(small_network(), [technique], dry_run=True).model
        for technique in (Simplify(), Factorize(reconstruct=False))
    )
    names = {layer.name for layer in layers(small_network())}
    rows = explain(cleaned).layers
    assert {row.name for row in rows} == names
    assert {(row.done, row.left) for row in rows} == {((), ())}
    assert f"{len(names)} x " in shown(explain(cleaned))
    assert "as it was: no pass of the recipe treats it" in shown(explain(cleaned))
    assert split.graph.num_nodes() > small_network().graph.num_nodes()
    assert {row.name for row in explain(split).layers} == names


def pruned(technique: Pass) -> dict[str, LayerRow]:
    made = onnxcomp.convert(residual(1, 1, 1), [technique], calib=small_context(16).data, dry_run=True).model
    return {row.name: row for row in explain(made).layers}


def test_layers_that_read_fewer_channels_and_those_fitted_again_say_so() -> None:
    model = residual(1, 1, 1)
    stem, *inside, last = [layer.name for layer in layers(model)]
    rows = pruned(Prune(parts=((inside[2], 12),)))
    assert set(rows) == {stem, *inside, last}
    assert rows[inside[2]].done == ("prune: 12 of 16 channels left", "prune: fitted again")
    assert rows[inside[3]].done == ("prune: 12 of 16 input channels left", "prune: fitted again")
    assert all(rows[name].done == ("prune: fitted again",) for name in (*inside[4:], last))
    assert all(rows[name].done == () for name in (stem, *inside[:2]))


def test_layers_that_could_have_lost_channels_say_why_they_did_not() -> None:
    stem, first, second, third, *_ = [layer.name for layer in layers(residual(1, 1, 1))]
    named, whole = pruned(Prune(parts=((third, 12),))), pruned(Prune(0.98, reconstruct=False, least=0.5))
    assert rows_left(named) == {"it is not among the parts that the recipe names", "'logits' is an output of the model"}
    assert all(named[name].left for name in (stem, first, second))
    assert third not in {name for name, row in named.items() if row.left}
    assert "the target is met without it" in rows_left(whole)
    assert all(row.done or row.left for row in whole.values())


def rows_left(rows: dict[str, LayerRow]) -> set[str]:
    return {reason.partition(": ")[2] for row in rows.values() for reason in row.left}


@pytest.mark.parametrize("technique", [PruneDepth, Prune])
def test_every_layer_of_a_branch_that_is_gone_says_so(technique: Callable[..., Pass]) -> None:
    model = residual(1, 1, 1)
    stem, *inside, last = [layer.name for layer in layers(model)]
    gone, other = joins(model)[1], joins(model)[2]
    parts = ((gone, 1),)
    narrow = ((inside[2], 12), (inside[4], 8))
    rows = pruned(technique(parts=parts) if technique is PruneDepth else technique(parts=narrow, branches=parts))
    said = next(iter(rows[gone].done)).partition(":")[0]
    for name in inside[2:4]:
        assert rows[name] == LayerRow(name, (f"{said}: gone with the branch at '{gone}'",), ())
    assert f"{said}: fitted again" in rows[last].done
    why = "stays: it is not among the parts that the recipe names"
    assert all(f"{said}: the branch at '{other}' {why}" in rows[name].left for name in (other, *inside[4:]))
    assert all(row.done or row.left for name, row in rows.items() if name != stem)


# --- size -----------------------------------------------------------------------------------------------------------


def test_the_record_is_small_against_the_model() -> None:
    context = small_context(16, target=Target(threads=1))
    made = onnxcomp.quantize(small_network(), calib=context.data, dry_run=True, target=context.target).model
    record = len(made.metadata_props["onnxcomp.record"])
    assert record < 0.02 * models.file_bytes(made)  # of 30 KB: a model of 300 KB has not ten times as many layers


def test_a_record_makes_no_tiny_model_larger_than_its_input(tmp_path: Path) -> None:
    model, output = mlp(tmp_path / "tiny.onnx"), tmp_path / "o.onnx"
    run("quantize", model, "--calib", samples(tmp_path / "d.npz"), "-o", output, "-q")
    said = {entry.key for entry in onnx.load(output).metadata_props}
    assert "onnxcomp.recipe" in said
    assert "onnxcomp.record" not in said
    message = run("explain", output, code=2).stderr
    assert "no record" in message
    assert "would have made the model larger" in message
    assert f"--recipe {output}" in message


def test_the_clock_is_in_no_record(lab: Lab) -> None:
    first = lab.optimize().model
    lab.latency = lambda model: 3.0 - 0.1 * len(integers(model))
    assert models.to_bytes(lab.optimize().model) == models.to_bytes(first)


# --- what is not there, or hostile ----------------------------------------------------------------------------------


def test_models_of_others_are_refused(tmp_path: Path) -> None:
    message = run("explain", mlp(tmp_path / "m.onnx"), code=2).stderr
    assert "m.onnx has no recipe in its metadata" in message
    (tmp_path / "m.onnx").write_bytes(b"nothing")
    assert "is not an ONNX model" in run("explain", tmp_path / "m.onnx", code=2).stderr
    assert "no such file" in run("explain", tmp_path / "none.onnx", code=2).stderr


def test_a_model_that_could_not_be_made_better_says_nothing_of_itself(lab: Lab, tmp_path: Path) -> None:
    lab.latency = lambda model: 1.0
    lab.loss = lambda model: float(bool(integers(model)))
    source, output = mlp(tmp_path / "m.onnx"), tmp_path / "o.onnx"
    result = lab.optimize(source, calib=samples(tmp_path / "d.npz", 121), output=output)
    assert "the result is the model as it was" in "".join(result.report.notes)
    assert output.read_bytes() == source.read_bytes()
    assert "or found nothing that makes it better and wrote it as it was" in run("explain", output, code=2).stderr


def packed(content: Any) -> str:
    return base64.b64encode(zlib.compress(json.dumps(content).encode())).decode()


STEPS: list[Any] = [[{}, {}], [{}, {}]]
HOSTILE = {
    "no base64": "\u00e9!",
    "no zlib": base64.b64encode(b"nothing").decode(),
    "cut off": RECORD.packed()[:-8],
    "empty": "",
    "bomb": base64.b64encode(zlib.compress(bytes(2**26), 9)).decode(),
    "no json": base64.b64encode(zlib.compress(b"{")).decode(),
    "no text": base64.b64encode(zlib.compress(b"\xff")).decode(),
    "nested": base64.b64encode(zlib.compress(b"[" * 100_000)).decode(),
    "a list": packed([]),
    "too few steps": packed({"steps": [], "metric": "", "trials": []}),
    "no trials": packed({"steps": STEPS, "metric": ""}),
    "nodes are numbers": packed({"steps": [[{"a": [1]}, {}], [{}, {}]], "metric": "", "trials": []}),
    "nodes are a number": packed({"steps": [[{"a": 1}, {}], [{}, {}]], "metric": "", "trials": []}),
    "a step is a number": packed({"steps": [1, 2], "metric": "", "trials": []}),
    "metric is none": packed({"steps": STEPS, "metric": None, "trials": []}),
    "size is a text": packed({"steps": STEPS, "metric": "", "trials": [["a", "b", None, "c"]]}),
    "size is huge": packed({"steps": STEPS, "metric": "", "trials": [["a", 10**400, None, "c"]]}),
    "drop is huge": packed({"steps": STEPS, "metric": "", "trials": [["a", 1, 10**400, "c"]]}),
    "drop is a list": packed({"steps": STEPS, "metric": "", "trials": [["a", 1, [], "c"]]}),
    "trials are a number": packed({"steps": STEPS, "metric": "", "trials": 5}),
}


@pytest.mark.parametrize("how", HOSTILE)
def test_damaged_and_hostile_records_are_refused(tmp_path: Path, how: str) -> None:
    path = mlp(tmp_path / "m.onnx", weights())
    made = stamped(models.load(path), models.load(path), RECIPE, RECORD, "00", 10**9)
    made.metadata_props["onnxcomp.record"] = HOSTILE[how]
    models.save(made, path, overwrite=True)
    message = run("explain", path, code=2).stderr
    assert f"the record in {path} cannot be read" in message
    with pytest.raises(ModelError):
        onnxcomp.apply(network(), recipe=path)


def test_a_damaged_recipe_is_refused_with_its_line(made: Path) -> None:
    proto = onnx.load(made)
    entry = next(entry for entry in proto.metadata_props if entry.key == "onnxcomp.recipe")
    entry.value = entry.value.replace("simplify", "simplfy")
    onnx.save(proto, made)
    message = run("explain", made, code=2).stderr
    assert f"the recipe in {made}, line 5, column 3: there is no pass 'simplfy'" in message
