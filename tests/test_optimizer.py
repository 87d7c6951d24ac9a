"""The whole job through its Python door: what it refuses, writes, notes and repeats."""

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime
import pytest

import onnxcomp
from models import zoo
from onnxcomp import candidates, optimizer, plots
from onnxcomp import model as models
from onnxcomp.budget import Budget
from onnxcomp.candidates import Effort
from onnxcomp.core import Context
from onnxcomp.data import open_dataset, split
from onnxcomp.errors import BudgetError, DataError, InputError, ModelError, OptionError, ProviderError
from onnxcomp.page import html_of
from onnxcomp.recipe import Recipe
from onnxcomp.report import Result
from onnxcomp.runtime import Protocol, Session, Target
from tests.lab import LAYERS, Lab, integers, lab, network, operators, samples, trial, wasteful
from tests.test_report import SCHEMA

__all__ = ["lab"]

RESULT = "m.opt.onnx"


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """The real thing, timed for an instant."""
    moment = Protocol(block=1, rounds=1, warmup=1)
    monkeypatch.setattr(candidates.Effort, "protocol", moment)
    monkeypatch.setattr(optimizer, "_PROOF", moment)

    def run(source: Any, **options: Any) -> Result:
        given: dict[str, Any] = {"effort": Effort.QUICK, "target": Target(threads=1)} | options
        return onnxcomp.optimize(source, **given)

    return run


def parsed(text: str, opset: int = 17) -> onnx.ModelProto:
    return onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": {opset}]> {text}')


# --- what is written ------------------------------------------------------------------------------------------------


def test_the_model_says_what_made_it(lab: Lab, tmp_path: Path) -> None:
    source, output = tmp_path / "m.onnx", tmp_path / RESULT
    models.save(network(), source)
    result = lab.optimize(source, output=output)
    written = {entry.key: entry.value for entry in onnx.load(output).metadata_props}
    assert written["onnxcomp.version"] == onnxcomp.__version__
    assert written["onnxcomp.input"] == models.fingerprint(source) == result.report.fingerprint
    recipe = Recipe.from_yaml(written["onnxcomp.recipe"])
    assert list(map(repr, recipe.passes)) == [step.recipe for step in result.report.steps]
    assert "- quantize-static:\n    range: mse" in written["onnxcomp.recipe"]
    assert result.report.result.size == output.stat().st_size
    assert result.report.original.size == source.stat().st_size
    assert result.report.output == str(output)


def test_the_recipe_reads_back_and_gives_the_same_bytes(lab: Lab) -> None:
    lab.loss = lambda model: 0.3 if "g2" in integers(model) else 0.0
    lab.order = lambda name: name == "g2"
    result = lab.optimize(effort=Effort.DEFAULT, seed=3)
    recipe = Recipe.from_yaml(result.model.metadata_props["onnxcomp.recipe"])
    model = network()
    tune = split(open_dataset(samples(), models.input_specs(model)), 3).tune
    context = Context(tune, Target(threads=1), seed=recipe.seed)
    for technique in recipe.passes:
        model = technique(model, context).model
    made = result.model.clone()
    for key in list(made.metadata_props):
        del made.metadata_props[key]
    models.forget_types(model, models.typed(network()))
    assert models.to_bytes(model) == models.to_bytes(made)


def test_same_seed_and_timings_same_bytes(lab: Lab) -> None:
    first, second, other = (lab.optimize(seed=seed) for seed in (5, 5, 6))
    assert models.to_bytes(first.model) == models.to_bytes(second.model) != models.to_bytes(other.model)
    assert first.report == second.report


def test_the_source_is_not_touched(lab: Lab) -> None:
    source = network()
    before = models.to_bytes(source)
    result = lab.optimize(source)
    assert models.to_bytes(source) == before
    assert [value.name for value in result.model.graph.inputs] == ["x"]
    assert result.model.graph.outputs[0].name == source.graph.outputs[0].name


def test_a_dry_run_decides_and_writes_nothing(lab: Lab, tmp_path: Path) -> None:
    (tmp_path / RESULT).write_text("old")
    result = lab.optimize(output=tmp_path / RESULT, dry_run=True)
    assert integers(result.model) == set(LAYERS)
    assert (tmp_path / RESULT).read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


def test_an_output_in_the_way_is_refused_before_any_work(lab: Lab, tmp_path: Path) -> None:
    (tmp_path / RESULT).write_text("old")
    with pytest.raises(ModelError, match="exists"):
        lab.optimize(output=tmp_path / RESULT)
    assert not lab.protocols
    lab.optimize(output=tmp_path / RESULT, overwrite=True)
    assert models.load(tmp_path / RESULT).graph.num_nodes() > 0


def test_types_that_the_input_did_not_tell_are_not_written(tmp_path: Path) -> None:
    plain, told, output = (tmp_path / name for name in ("m.onnx", "told.onnx", RESULT))
    proto = zoo.build("gpt")
    onnx.save(proto, plain)
    onnx.save(onnx.shape_inference.infer_shapes(proto), told)
    for source in (plain, told):
        onnxcomp.simplify(source, output=output, overwrite=True)
        between, known = ({value.name for value in onnx.load(path).graph.value_info} for path in (output, source))
        constants = {tensor.name for tensor in onnx.load(source).graph.initializer}
        assert between <= known - constants
        assert bool(between) == (source is told)
    assert output.stat().st_size < told.stat().st_size
    onnxcomp.quantize(plain, scheme="int4-weights", output=output, overwrite=True)
    graph = onnx.load(output).graph
    of_others = {name for node in graph.node if node.domain for name in node.output}
    assert of_others
    assert {value.name for value in graph.value_info} == of_others - {value.name for value in graph.output}


# --- the page -------------------------------------------------------------------------------------------------------


def test_a_page_says_what_became_of_each_layer(lab: Lab, tmp_path: Path) -> None:
    source, output, target = (tmp_path / name for name in ("m.onnx", RESULT, "page.html"))
    models.save(network(), source)
    report = lab.optimize(source, output=output, report=target, seed=3).report
    assert [row.name for row in report.layers if row.op == "MatMul"] == list(LAYERS)
    for row in report.layers[: len(LAYERS)]:
        assert re.match(r"QuantizeStatic: (7-bit )?int8", row.techniques[-1])
        assert row.sensitivity is not None
        assert row.weights_after is not None
    jsonschema.validate(json.loads(json.dumps(report.to_json())), SCHEMA)
    text = target.read_text(encoding="utf-8")
    assert text == html_of(report)
    assert report.fingerprint in text
    assert shlex.split(report.command)[:3] == ["onnxcomp", "optimize", str(source)]
    assert "--seed 3" in text


def test_without_a_page_no_layer_is_looked_at(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizer, "layer_rows", None)
    monkeypatch.setattr(plots, "find_spec", lambda name: None)
    assert lab.optimize().report.layers == ()


def test_a_page_that_cannot_be_written_is_refused_before_any_work(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, there = tmp_path / "m.onnx", tmp_path / "page.html"
    models.save(network(), source)
    before = source.read_bytes()
    there.write_text("old")
    for target, options, words in (
        (there, {}, "exists\n  remedy: add --overwrite, or give another name to --report"),
        (source, {"overwrite": True}, "is an input itself"),
        (tmp_path / "no" / "page.html", {}, "does not exist"),
        (tmp_path / RESULT, {"output": tmp_path / RESULT}, "both to be"),
    ):
        with pytest.raises(InputError, match=words):
            lab.optimize(source, report=target, **options)
    monkeypatch.setattr(plots, "find_spec", lambda name: None)
    with pytest.raises(OptionError, match=r"onnxcomp\[report\]"):
        lab.optimize(source, report=tmp_path / "other.html")
    assert not lab.protocols
    assert (there.read_text(), source.read_bytes()) == ("old", before)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.onnx", "page.html"]


def test_a_page_is_written_where_the_model_is_not(lab: Lab, tmp_path: Path) -> None:
    target = tmp_path / "page.html"
    with pytest.raises(BudgetError) as caught:
        lab.optimize(output=tmp_path / RESULT, report=target, budget=Budget(min_speedup=10))
    assert "NOT within the budget: speed-up" in target.read_text(encoding="utf-8")
    assert isinstance(caught.value.result, Result)
    assert caught.value.result.report.layers
    lab.optimize(output=tmp_path / RESULT, report=target, dry_run=True, overwrite=True)
    assert "NOT within the budget" not in target.read_text(encoding="utf-8")
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


def test_layers_that_cannot_be_looked_at_are_a_note(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ModelError("it is too dark")

    monkeypatch.setattr(optimizer, "layer_rows", fail)
    report = lab.optimize(report=tmp_path / "page.html").report
    assert report.layers == ()
    assert "Layers not looked at. it is too dark" in report.notes


# --- budgets --------------------------------------------------------------------------------------------------------


def test_over_the_budget_only_best_effort_writes(lab: Lab, tmp_path: Path) -> None:
    budget = Budget(min_speedup=10)
    with pytest.raises(BudgetError, match=r"speed-up is 2\.5x, the limit is 10x") as caught:
        lab.optimize(output=tmp_path / RESULT, budget=budget)
    assert isinstance(caught.value.result, Result)
    assert integers(caught.value.result.model) == set(LAYERS)
    assert not list(tmp_path.iterdir())
    result = lab.optimize(output=tmp_path / RESULT, budget=budget, best_effort=True)
    assert not result.report.met
    assert (tmp_path / RESULT).is_file()


def test_models_beyond_the_limit_of_protobuf(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "PROTOBUF_LIMIT", 5000)  # instead of 2 GB
    output = tmp_path / RESULT
    result = lab.optimize(output=output)
    files = list(tmp_path.iterdir())
    assert {file.name for file in files} == {RESULT, f"{RESULT}.data"}
    assert 0 < result.report.result.size <= sum(file.stat().st_size for file in files)  # the graph is not counted
    assert integers(models.load(output)) == set(LAYERS)


# --- what is allowed ------------------------------------------------------------------------------------------------


def test_excluded_nodes_stay_as_they_are(lab: Lab) -> None:
    result = lab.optimize(exclude="^g[13]$")
    assert integers(result.model) == set(LAYERS) - {"g1", "g3"}
    skips = {skip.node: skip.reason for step in result.report.steps for skip in step.skips}
    assert "excluded" in skips["g1"]


def test_clean_up_alone(lab: Lab) -> None:
    result = lab.optimize(wasteful(), passes=["simplify"])
    assert [t.name for t in result.report.trials] == ["clean-up"]
    assert result.report.notes == ()
    assert result.report.met


def test_a_pass_without_clean_up(lab: Lab) -> None:
    result = lab.optimize(passes=["quantize-static"])
    assert [step.recipe.partition("(")[0] for step in result.report.steps] == ["QuantizeStatic"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exclude": "("}, "not a regular expression"),
        ({"passes": ["quantise"]}, "did you mean 'quantize'"),
        ({"batch": 0}, "a batch of 0"),
        ({"metric": "acuracy"}, "did you mean 'accuracy'"),
    ],
)
def test_options_that_make_no_sense(lab: Lab, options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        lab.optimize(**options)


def test_where_the_original_is_infinitely_good_the_budget_is_on_the_relative_error(lab: Lab) -> None:
    lab.loss = lambda model: 0.1 if integers(model) else 0.0
    report = lab.optimize(metric="sqnr").report
    assert report.metric == "sqnr"
    assert report.result.drop == pytest.approx(0.1)
    assert report.met
    assert any("budget is on the relative-error" in note for note in report.notes)


def test_outputs_that_are_not_finite_are_said(lab: Lab) -> None:
    model = network()
    model.graph.outputs[0] = ir.val("log", dtype=ir.DataType.FLOAT, shape=ir.Shape(["n", 32]))
    node = ir.node("Log", [model.graph.node(-1).outputs[0]], outputs=[model.graph.outputs[0]], name="log")
    model.graph.append(node)
    result = lab.optimize(source=model)
    assert any("not all finite" in note for note in result.report.notes)


# --- data -----------------------------------------------------------------------------------------------------------


def test_without_data_it_says_that_it_guessed_and_leaves_static_int8_alone(lab: Lab) -> None:
    result = lab.optimize(calib=None)
    assert "made-up inputs" in result.report.notes[0]
    assert not any("static" in t.name for t in result.report.trials)
    assert any("dynamic" in t.name for t in result.report.trials)


def test_few_samples_are_not_split_and_the_report_says_so(lab: Lab) -> None:
    result = lab.optimize(calib=samples(99))
    assert "99 samples, too few to split (judge = final)" in result.report.data
    assert "flattered" in result.report.notes[0]


def test_evaluation_data_alone(lab: Lab) -> None:
    result = lab.optimize(calib=None, evaluation=samples(121, labels=True))
    assert result.report.metric == "accuracy"
    assert integers(result.model) == set(LAYERS)
    assert "no --calib" in result.report.notes[0]


def test_a_users_metric_is_called_whole_and_its_budget_kept(brief: Callable[..., Result], tmp_path: Path) -> None:
    np.savez(tmp_path / "own.npz", x=samples(10)["x"])
    file = tmp_path / "mine.py"
    file.write_text(
        "import numpy as np, pathlib\n"
        "x = np.load(pathlib.Path(__file__).with_name('own.npz'))['x']\n"
        "def size(predict):\n    return -float(np.abs(next(iter(predict({'x': x}).values()))).mean())\n"
    )
    report = brief(network(), calib=samples(), metric=f"{file}:size", budget=Budget(max_drop=1.0)).report
    assert report.data == f"{file}:size, called whole (judge = final)"
    assert report.original.score is not None
    assert report.original.score < 0
    assert report.original.score_interval is None
    assert report.result.drop is not None
    assert report.result.drop <= 1.0


def test_relative_errors_are_real(brief: Callable[..., Result]) -> None:
    result = brief(network(), calib=samples(), passes=["quantize-weights"])
    data = samples()["x"]
    first, second = (
        next(iter(Session(model, Target(threads=1)).run({"x": data}).values())).astype(np.float64)
        for model in (network(), result.model)
    )
    error = np.linalg.norm(second - first) / np.linalg.norm(first)
    assert result.report.result.drop == pytest.approx(error, rel=0.3, abs=1e-6)  # on a quarter of the samples


@pytest.mark.parametrize(("asked", "fixed", "rows"), [(16, None, 16), (4, 4, 4), (1, 4, 4), (16, 4, 4)])
def test_batches(lab: Lab, asked: int, fixed: int | None, rows: int) -> None:
    model = network()
    if fixed:
        model.graph.inputs[0].shape = ir.Shape([fixed, 32])
    report = lab.optimize(model, calib=samples(5), batch=asked).report
    assert report.environment["batch"] == rows
    assert (f"Runs have {rows} rows: the model or its data fix that." in report.notes) == (asked != rows)


def test_data_on_which_the_model_itself_fails() -> None:
    model = parsed("g (int64[n] i) => (float[m] y) <float[2] table = {1.0, 2.0}> { y = Gather(table, i) }")
    with pytest.raises(DataError, match="does not run on the data"):
        onnxcomp.optimize(model, calib={"i": np.array([1, 7])})


# --- odd models -----------------------------------------------------------------------------------------------------

ODD = {
    "nothing to quantize": "g (float[n,4] x) => (float[n,4] y) { y = Sin(x) }",
    "integers only": "g (int64[n,4] x) => (int64[n,4] y) { y = Add(x, x) }",
    "constant": "g () => (float[2] y) { c = Constant <value = float[2] {1., 2.}> () y = Sin(c) }",
    "scalar": "g (float x) => (float y) { y = Sin(x) }",
    "empty output": "g (float[n,4] x) => (float[n,0] y) <int64[1] i = {0}, int64[1] a = {1}> { y = Slice(x, i, i, a) }",
    "booleans": "g (bool[n] x) => (bool[n] y) { y = Not(x) }",
}


@pytest.mark.parametrize("text", ODD.values(), ids=ODD)
def test_odd_models_come_out_as_good_as_they_went_in(brief: Callable[..., Result], text: str) -> None:
    result = brief(parsed(text))
    assert result.report.met
    assert result.report.result.drop == pytest.approx(0, abs=1e-6)  # constants are folded by another library
    assert any("can be quantized" in note or "as it was" in note for note in result.report.notes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("g (string[n] x) => (string[n] y) { y = Identity(x) }", "no output can be compared"),
        ("g (float[n] x) => (seq(float[m]) y) { y = SequenceConstruct(x) }", "no output can be compared"),
        ("g (seq(float[n]) x) => (float[m] y) { y = ConcatFromSequence <axis = 0> (x) }", "not a tensor"),
        ("g (float[6] x, int64[2] sizes) => (float[m] y, float[k] z) { y, z = Split(x, sizes) }", "made-up inputs"),
    ],
)
def test_what_cannot_be_judged_is_refused_in_words(brief: Callable[..., Result], text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        brief(parsed(text))


def test_a_model_that_answers_at_random_is_said_to(brief: Callable[..., Result]) -> None:
    model = parsed("g (float[n,4] x) => (float[n,4] y) { r = RandomUniformLike(x) y = Add(x, r) }")
    result = brief(model, best_effort=True, dry_run=True)
    assert any("differently each time" in note for note in result.report.notes)


# --- execution providers --------------------------------------------------------------------------------------------


def test_a_provider_that_is_not_there_is_refused_with_those_that_are(lab: Lab) -> None:
    with pytest.raises(ProviderError, match=r"'tpu' is not available; available:.*cpu"):
        lab.optimize(target=Target("tpu"))
    assert not lab.protocols


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime says that it has CUDA and TensorRT, and runs everything on the CPU."""
    names = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]

    class Anywhere(onnxruntime.InferenceSession):
        def __init__(self, model: Any, options: Any, providers: list[str]) -> None:
            super().__init__(model, options, providers=["CPUExecutionProvider"])
            self.wanted = providers

        def get_providers(self) -> list[str]:
            return self.wanted

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: names)
    monkeypatch.setattr(onnxruntime, "InferenceSession", Anywhere)


INT8_AND_HALF = ("quantize-static", "quantize-dynamic", "convert-float")


def drafted(lab: Lab, provider: str, *named: str) -> dict[str, str]:
    """The drafts for a provider, with the recipe of each."""
    lab.latency = lambda model: 1.0
    made = []
    make = candidates.Workbench.make

    def record(self: Any, name: str, recipe: Any) -> Any:
        made.append((name, repr(recipe[-1]) if recipe else ""))
        return make(self, name, recipe)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(candidates.Workbench, "make", record)
        lab.optimize(target=Target(provider, 1), passes=["simplify", *(named or INT8_AND_HALF)])
    return dict(made[1:])


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("provider", ["cuda", "CUDA", "CUDAExecutionProvider"])
def test_cuda_gets_half_precision_and_no_int8(lab: Lab, provider: str) -> None:
    assert drafted(lab, provider) == {"fp16": "ConvertFloat(to=Float.FP16, keep=())"}


@pytest.mark.usefixtures("gpu")
def test_tensorrt_gets_half_precision_and_its_own_placement(lab: Lab) -> None:
    found = drafted(lab, "tensorrt")
    assert set(found) == {"fp16", "static INT8"}
    assert "signed=True" in found["static INT8"]
    assert "inputs_only=True" in found["static INT8"]


def test_the_cpu_gets_no_half_precision_unasked(lab: Lab) -> None:
    found = drafted(lab, "cpu", "quantize")
    assert {"static INT8", "dynamic INT8"} <= set(found)
    assert not {"fp16", "convert-float"} & set(found)


def test_what_the_user_names_is_tried(lab: Lab) -> None:
    assert set(drafted(lab, "cpu", "convert-float")) == {"convert-float"}
    assert "smooth" in drafted(lab, "cpu", "quantize-static", "smooth")


def test_names_of_the_command_line_serve_in_python(lab: Lab) -> None:
    result = lab.optimize(effort="quick", target="cpu")
    assert result.report.environment["provider"] == "CPUExecutionProvider"
    with pytest.raises(OptionError, match="there is no effort 'hasty'"):
        lab.optimize(effort="hasty")
    with pytest.raises(OptionError, match="no pass was named"):
        lab.optimize(passes=[])


def test_seed_and_exclusion_are_in_the_recipe(lab: Lab) -> None:
    props = lab.optimize(seed=7, exclude="g2").model.metadata_props
    recipe = Recipe.from_yaml(props["onnxcomp.recipe"])
    assert (recipe.seed, recipe.exclude) == (7, "g2")
    assert not {"onnxcomp.seed", "onnxcomp.exclude"} & props.keys()


@pytest.mark.usefixtures("gpu")
def test_half_precision_is_chosen_where_it_is_faster(lab: Lab) -> None:
    lab.latency = lambda model: 0.5 if "Cast" in operators(model) else 1.0
    result = lab.optimize(target=Target("cuda", 1), passes=["simplify", "quantize"])
    assert trial(result, "fp16").verdict == "chosen"
    assert "CUDAExecutionProvider" in str(result.report.environment["provider"])
