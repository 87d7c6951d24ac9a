"""Each command does what it says, and says what it did."""

import functools
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import jsonschema
import numpy as np
import onnx
import pytest
from click.testing import CliRunner

import onnxcomp
from models import zoo
from onnxcomp import conversion, footprint, inspection, measure, metrics, techniques
from onnxcomp import model as models
from onnxcomp.budget import Budget
from onnxcomp.cli import _CRITERIA, main
from onnxcomp.errors import BudgetError
from onnxcomp.family import Family, Member
from onnxcomp.footprint import Footprint
from onnxcomp.passes.quantize_static import Range
from onnxcomp.recipe import Recipe
from onnxcomp.registry import passes
from onnxcomp.report import Report, Result
from onnxcomp.runtime import Protocol, Target
from onnxcomp.saliency import Criterion
from tests.commands import child, mlp, outputs, run, samples, weights
from tests.test_report import FULL, SCHEMA

MODELS = Path(__file__).parents[1] / "models"
FAST = Protocol(block=2, rounds=3, warmup=1)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return mlp(tmp_path / "tiny.onnx")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return samples(tmp_path / "data.npz")


@pytest.fixture
def light(monkeypatch: pytest.MonkeyPatch) -> None:
    """No fresh processes."""
    monkeypatch.setattr(measure, "footprint", lambda *_: Footprint(0.25, 3_000_000))


def document(result: Any) -> dict[str, Any]:
    """What `--json -` printed, after the schema."""
    plain: dict[str, Any] = json.loads(result.stdout)
    jsonschema.validate(plain, SCHEMA)
    return plain


# --- simplify and quantize ------------------------------------------------------------------------------------------


def test_simplify_writes_beside_the_input(model: Path) -> None:
    result = run("simplify", model, "--threads", 1)
    written = model.with_name("tiny.opt.onnx")
    assert f"Wrote {written}" in result.stdout
    x = np.ones((3, 8), "f4")
    before, after = (outputs(path, x) for path in (model, written))
    np.testing.assert_allclose(before, after, rtol=1e-5)
    recipe = {entry.key: entry.value for entry in onnx.load(written).metadata_props}
    assert recipe["onnxcomp.input"] == onnxcomp.model.fingerprint(model)


def test_int8_is_smaller_and_its_loss_is_measured_on_the_evaluation_data(model: Path, data: Path) -> None:
    plain = document(run("quantize", model, "--calib", data, "--eval", data, "--json", "-"))
    written = model.with_name("tiny.opt.onnx")
    assert plain["result"]["size"] == written.stat().st_size
    assert plain["original"]["size"] == model.stat().st_size
    assert plain["metric"] == "accuracy"
    x, label = (np.load(data)[key] for key in ("x", "label"))
    hits = outputs(written, x).argmax(1) == label
    assert plain["result"]["score"] == pytest.approx(hits.mean())
    assert plain["original"]["score"] == 1.0
    assert plain["result"]["drop"] == pytest.approx(1 - hits.mean())
    low, high = plain["result"]["drop_interval"]
    assert 0 <= low <= plain["result"]["drop"] <= high < 1
    assert any(node.op_type == "QuantizeLinear" for node in onnx.load(written).graph.node)


@pytest.mark.parametrize(
    ("scheme", "operator"),
    [
        ("int8-dynamic", "MatMulInteger"),
        ("int8-weights", "DequantizeLinear|MatMulNBits"),
        ("int4-weights", "DequantizeLinear|MatMulNBits"),
        ("fp16", "Cast"),
        ("bf16", "Cast"),
    ],
)
def test_every_scheme_leaves_its_operators(tmp_path: Path, scheme: str, operator: str) -> None:
    random = np.random.default_rng(0)
    wide = {"w1": random.standard_normal((256, 8)), "w2": random.standard_normal((4, 256))}
    shapes = {name: array.astype("f4") for name, array in wide.items()}
    model = mlp(tmp_path / "wide.onnx", shapes)
    run("quantize", model, "--scheme", scheme, "-q")
    written = onnx.load(tmp_path / "wide.opt.onnx")
    assert any(re.fullmatch(operator, node.op_type) for node in written.graph.node)


def test_without_evaluation_data_the_loss_is_the_relative_error_and_says_on_what(model: Path, data: Path) -> None:
    learnt = run("quantize", model, "--calib", data, "--dry-run")
    assert f"relative-error (no evaluation data) on 32 samples of {data}, the calibration data" in learnt.stdout
    invented = run("quantize", model, "--scheme", "int8-dynamic", "--dry-run")
    assert "relative-error (no evaluation data) on 32 samples of synthetic data" in invented.stdout
    assert "give --eval" in invented.stdout


def test_settings_reach_the_passes(model: Path, data: Path) -> None:
    off = ["--no-gptq", "--no-polish", "--no-bias-correction", "--no-equalize", "--no-smooth", "--range", "minmax"]
    plain = document(run("quantize", model, "--calib", data, "--dry-run", "--json", "-", *off, "--keep-overridable"))
    simplify, static = (step["recipe"] for step in plain["steps"])
    assert simplify == "Simplify(keep_overridable=True)"
    assert "gptq=False, sweeps=0, bias_correction=False" in static
    assert repr(Range.MINMAX) in static
    plain = document(run("quantize", model, "--calib", data, "--dry-run", "--json", "-"))
    names = [step["recipe"].partition("(")[0] for step in plain["steps"]]
    assert names == ["Simplify", "Equalize", "Smooth", "QuantizeStatic"]
    assert "gptq=True" in plain["steps"][-1]["recipe"]
    assert [technique.name for technique in Recipe.from_yaml(plain["recipe"]).passes] == [
        "simplify", "equalize", "smooth", "quantize-static",
    ]  # fmt: skip


def test_excluded_nodes_are_left_with_that_reason(model: Path, data: Path) -> None:
    result = run("quantize", model, "--calib", data, "--scheme", "int8-dynamic", "--exclude", "^Gemm_y$", "--dry-run")
    assert "excluded by the user (Gemm_y)" in result.stdout


def test_a_dry_run_writes_no_model(model: Path, data: Path) -> None:
    before = set(model.parent.iterdir())
    result = run("quantize", model, "--calib", data, "--dry-run")
    assert "Dry run: no model was written." in result.stdout
    assert set(model.parent.iterdir()) == before


def test_an_output_is_overwritten_only_when_asked(model: Path) -> None:
    run("simplify", model, "-q")
    assert "add --overwrite" in run("simplify", model, code=2).stderr
    run("simplify", model, "-q", "--overwrite")


@pytest.fixture
def coarse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every result scores half a point less than nothing lost."""
    compare = metrics.compare
    monkeypatch.setattr(metrics, "compare", lambda *pair: metrics.Drop(compare(*pair).value + 0.005, None))


@pytest.mark.usefixtures("coarse")
def test_max_drop_is_a_gate(model: Path, data: Path) -> None:
    written = model.with_name("tiny.opt.onnx")
    command = ["quantize", model, "--calib", data, "--eval", data, "--scheme", "int8-weights"]
    result = run(*command, "--max-drop", "0.4%", code=3)
    assert "accuracy drops by 0.005, more than 0.004" in result.stderr
    assert "NOT within the budget" in result.stdout
    assert not written.exists()
    assert f"Wrote {written}" in run(*command, "--max-drop", "0.4%", "--best-effort", code=3).stdout
    assert written.exists()
    result = run(*command, "--max-drop", "0.5%", "--overwrite")
    assert "Within the budget: a drop of at most 0.5 points" in result.stdout


def test_letters_hold_their_accuracy_in_dynamic_int8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversion, "Protocol", lambda: FAST)
    whole = np.load(MODELS / "letters_eval.npz")
    np.savez(tmp_path / "eval.npz", **{name: whole[name][:64] for name in whole})
    scheme, target = techniques.Scheme.INT8_DYNAMIC, Target(threads=1)
    result = onnxcomp.quantize(
        MODELS / "letters.onnx", scheme=scheme, evaluation=tmp_path / "eval.npz", target=target, max_drop=0.05
    )
    report: Report = result.report
    assert report.result.size < 0.4 * report.original.size
    assert report.metric == "accuracy"
    assert report.original.score is not None
    assert report.original.score > 0.9
    assert report.output is None


def test_a_model_given_as_bytes_is_converted_in_memory(model: Path) -> None:
    result = onnxcomp.simplify(model.read_bytes())
    assert result.report.source == "bytes"
    assert result.report.original.size == model.stat().st_size


# --- optimize -------------------------------------------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What `optimize` was called with; it only pretends to work."""
    made: list[dict[str, Any]] = []
    module: Any = ModuleType("onnxcomp.optimizer")

    def work(source: Path, **settings: Any) -> Result:
        made.append({"source": source} | settings)
        member = Member("01.onnx", "plan 7", FULL.result, True)
        family = Family("a.onnx", FULL.original, (member,), "accuracy", "", "", {}) if settings["pareto"] else None
        result = Result(onnxcomp.load(source), FULL, family)
        if settings["budget"].min_speedup == 9:
            error = BudgetError("no result within the budget")
            error.result = result
            raise error
        return result

    module.optimize = work
    module.Effort = str
    monkeypatch.setitem(sys.modules, "onnxcomp.optimizer", module)
    return made


def test_optimize_gets_every_option(model: Path, data: Path, calls: list[dict[str, Any]]) -> None:
    result = run(
        *("optimize", model, "-o", model.parent / "o.onnx", "--calib", data, "--eval", data, "--metric", "accuracy"),
        *("--max-drop", "1%", "--max-latency", "5ms", "--min-speedup", "2x", "--max-size", "25%", "--passes", "a, b"),
        *("--exclude", "head", "--threads", 1, "--batch", 4, "--effort", "quick", "--seed", 3, "--memory", "1GiB"),
        *("--image-size", "4x6", "--mean", "1,2,3", "--std", "4", "--layout", "NHWC"),
        *("--dry-run", "--overwrite", "--best-effort", "--keep-overridable", "--report", "page.html"),
        *("--executor", "local:2", "--time-limit", "3min", "--cache", "kept", "--pareto", "all", "--max-memory", "1MB"),
    )
    assert "a.onnx -> b.onnx" in result.stdout
    (call,) = calls
    images, target = call.pop("images"), call.pop("target")
    assert (images.size, images.mean, images.std, images.layout) == ((4, 6), (1, 2, 3), (4,), "NHWC")
    assert target == Target("cpu", 1)
    call.pop("progress")
    assert call == {
        "source": model,
        "output": model.parent / "o.onnx",
        "report": Path("page.html"),
        "executor": "local:2",
        "calib": data,
        "evaluation": data,
        "metric": "accuracy",
        "budget": Budget(0.01, 0.005, 2.0, None, 0.25, 10**6),
        "time_limit": 180.0,
        "cache": Path("kept"),
        "pareto": Path("all"),
        "passes": ("a", "b"),
        "exclude": "head",
        "batch": 4,
        "effort": "quick",
        "seed": 3,
        "memory": 2**30,
        "dry_run": True,
        "overwrite": True,
        "best_effort": True,
        "keep_overridable": True,
    }


def test_an_unreachable_budget_shows_the_best_effort(model: Path, calls: list[dict[str, Any]]) -> None:
    result = run("optimize", model, "--min-speedup", 9, code=3)
    assert "a.onnx -> b.onnx" in result.stdout
    assert "Wrote" not in result.stdout
    assert "no result within the budget" in result.stderr
    assert calls[0]["output"] == model.with_name("tiny.opt.onnx")


@pytest.mark.parametrize(("speedup", "code"), [(1, 0), (9, 3)])
def test_what_is_worth_a_choice_is_listed_whatever_the_budget(
    model: Path, calls: list[dict[str, Any]], speedup: int, code: int
) -> None:
    result = run("optimize", model, "--min-speedup", speedup, "--pareto", model.parent / "all", code=code)
    assert re.search(r"^01\.onnx +plan 7 .* the result$", result.stdout, re.MULTILINE)
    assert ("Wrote" in result.stdout) == (code == 0)


def test_no_report_goes_where_the_family_may(model: Path, calls: list[dict[str, Any]]) -> None:
    index = model.parent / "pareto.json"
    index.write_text(json.dumps(FULL.to_json(), indent=2))
    result = run("optimize", model, "--json", index, "--pareto", model.parent, "--dry-run", code=2)
    assert "is where --pareto may write" in result.stderr
    assert calls == []


def test_json_goes_to_a_file_and_quiet_is_quiet(model: Path, calls: list[dict[str, Any]]) -> None:
    file = model.parent / "r.json"
    result = run("optimize", model, "--json", file, "-q")
    assert result.output == ""
    assert json.loads(file.read_text()) == FULL.to_json()
    assert calls[0]["memory"] == 2 * 10**9


def test_a_report_that_cannot_be_written_is_refused_before_any_work(model: Path, calls: list[dict[str, Any]]) -> None:
    result = run("optimize", model, "--json", model.parent / "missing" / "r.json", code=2)
    assert "does not exist" in result.stderr
    assert calls == []


def test_optimize_end_to_end(model: Path, data: Path) -> None:
    written = model.with_name("tiny.opt.onnx")
    plain = document(run("optimize", model, "--calib", data, "--eval", data, "--effort", "quick", "--json", "-"))
    assert plain["result"]["size"] == written.stat().st_size
    assert plain["met"] is True
    assert "What was tried" in run("optimize", model, "--calib", data, "--effort", "quick", "--dry-run").stdout
    unreachable = ["--effort", "quick", "--min-speedup", "1000x", "--overwrite"]
    before = written.read_bytes()
    assert "the limit is 1000x" in run("optimize", model, *unreachable, code=3).stderr
    assert written.read_bytes() == before
    assert "Wrote" in run("optimize", model, *unreachable, "--best-effort", code=3).stdout


# --- bench, eval, inspect, passes -----------------------------------------------------------------------------------


@pytest.mark.usefixtures("light")
def test_bench_compares_with_the_first(model: Path, data: Path) -> None:
    other = mlp(model.with_name("other.onnx"), weights(1))
    result = run("bench", model, other, "--calib", data, "--batch", 4, "--threads", 1)
    assert "medians over alternating blocks of 20 consecutive runs" in result.stdout
    assert "1 thread, batch 4" in result.stdout
    assert "250 ms [250 ms, 250 ms]" in result.stdout
    assert "3.00 MB" in result.stdout
    cold = document(run("bench", model, other, "--cold", "--json", "-"))
    assert "single runs" in cold["protocol"]
    first, second = cold["models"]
    assert first["latency"]["speedup"] == 1.0
    assert first["throughput"] == pytest.approx(1 / first["latency"]["median"])
    assert second["size"] == other.stat().st_size


@pytest.mark.usefixtures("light")
def test_a_batch_that_the_model_fixes_is_said() -> None:
    graph = ir_fixed()
    benchmark = onnxcomp.bench([graph], batch=4, protocol=FAST)
    assert benchmark.environment["batch"] == 2
    assert "Runs have 2 rows" in benchmark.notes[0]


def ir_fixed() -> Any:
    text = '<ir_version: 8, opset_import: ["": 17]> g (float[2,3] x) => (float[2,3] y) { y = Relu (x) }'
    return onnx.parser.parse_model(text)


def test_models_with_other_inputs_cannot_be_compared(model: Path) -> None:
    with pytest.raises(onnxcomp.errors.ModelError, match=r"takes 'x' float32, .* takes 'z' int64"):
        measure.bench([swapped("z", "int64"), model])


def swapped(name: str, kind: str) -> Any:
    text = f'<ir_version: 8, opset_import: ["": 17]> g ({kind}[2] {name}) => ({kind}[2] y) {{ y = Identity ({name}) }}'
    return onnx.parser.parse_model(text)


def test_a_fresh_process_tells_load_time_and_memory(model: Path) -> None:
    taken = footprint.footprint(model, Target(threads=1), {"x": np.ones((1, 8), "f4")})
    assert 0 < taken.load_seconds < 30
    if sys.platform == "linux":
        assert taken.memory is not None
        assert 0 < taken.memory < 10**9


def test_a_failing_fresh_process_is_an_error(model: Path) -> None:
    with pytest.raises(onnxcomp.errors.OnnxcompError, match="could not be loaded and run: a fresh process failed"):
        footprint.footprint(model.with_name("missing.onnx"), Target(), {})


def test_eval_gives_metric_interval_and_fidelity(model: Path, data: Path) -> None:
    other = mlp(model.with_name("other.onnx"), weights(1))
    plain = document(run("eval", model, other, "--eval", data, "--json", "-"))
    first, second = plain["models"]
    assert plain["metric"] == "accuracy"
    assert (first["score"], first["drop"], first["agreement"]) == (1.0, None, None)
    x, label = (np.load(data)[key] for key in ("x", "label"))
    y, z = (outputs(path, x) for path in (model, other))
    assert second["score"] == second["agreement"] == pytest.approx((z.argmax(1) == label).mean())
    assert second["drop"] == pytest.approx(1 - second["score"])
    assert second["score_interval"][0] < second["score"] < second["score_interval"][1]
    assert second["relative_error"] == pytest.approx(np.linalg.norm(z - y) / np.linalg.norm(y))
    text = run("eval", model, model, "--eval", data, "--metric", "sqnr").stdout
    assert "no loss" in text
    assert "100.00%" in text


def test_an_infinite_score_is_still_json(model: Path, data: Path) -> None:
    plain = document(run("eval", model, "--eval", data, "--metric", "sqnr", "--json", "-"))
    assert plain["models"][0]["score"] == "Infinity"


def test_agreement_is_left_out_where_no_output_has_classes(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", z=np.ones((6, 2), "f4"))
    result = measure.evaluate([swapped("z", "float"), swapped("z", "float")], tmp_path / "d.npz")
    assert result.models[1].relative_error == 0
    assert result.models[1].agreement is None


def test_inspect_counts_by_hand(model: Path) -> None:
    plain = document(run("inspect", model, "--batch", 2, "--json", "-"))
    first, relu, second = plain["nodes"]
    assert (first["parameters"], first["bytes"], first["flops"]) == (512, 2048, 2 * 2 * 64 * 8)
    assert (relu["op"], relu["shape"], relu["parameters"]) == ("Relu", [2, 64], 0)
    assert second["flops"] == 2 * 2 * 4 * 64
    assert plain["parameters"] == 512 + 256
    assert any(node["microseconds"] for node in plain["nodes"])
    text = run("inspect", model).stdout
    assert "x: float32[batch, 8]" in text
    assert "768 parameters in 3.07 KB" in text
    assert re.search(r"\d\.\d%$", text, re.MULTILINE)


def test_shapes_behind_computed_reshapes_are_those_of_a_run() -> None:
    nodes = inspection.inspect(MODELS / "letters.onnx", batch=2, target=Target(threads=1)).nodes
    assert all(node.shape is not None and node.note == "" for node in nodes)
    assert max(node.shape[0] for node in nodes if node.op == "Softmax" and node.shape) == 2


def test_a_model_that_does_not_load_is_inspected_without_times(tmp_path: Path) -> None:
    model = mlp(tmp_path / "odd.onnx", operator="Unheard")
    result = run("inspect", model)
    assert "Not timed. ONNX Runtime" in result.stdout
    assert "Unheard" in result.stdout


def test_groups_of_channels_are_shown_when_asked_for(model: Path) -> None:
    plain = document(run("inspect", model, "--groups", "--json", "-"))
    first, _, second = (node["name"] for node in plain["nodes"])
    assert plain["groups"] == [
        {
            "name": first,
            "size": 64,
            "width": 1,
            "made_by": [first],
            "read_by": [second],
            "tensors": 4,  # both weights, and what is before and behind the Relu
            "crossing": [],
        }
    ]
    assert plain["frozen"] == [{"name": second, "reason": "'y' is an output of the model"}]
    text = run("inspect", model, "--groups").stdout
    assert re.search(rf"^{first} +64 +{first} +{second} +4$", text, re.MULTILINE)
    assert f"1 x 'y' is an output of the model ({second})" in text
    without = document(run("inspect", model, "--json", "-"))
    assert without["groups"] == without["frozen"] == []
    assert "Channels" not in run("inspect", model).stdout


def test_heads_are_told_from_their_dimensions() -> None:
    rows = inspection.inspect(MODELS / "letters.onnx", target=Target(threads=1), groups=True).groups
    attention = {row.name.removeprefix("/layers.0/attention/"): row for row in rows}
    heads, dimensions = attention["query/MatMul"], attention["query/MatMul#2"]
    assert (heads.size, heads.width, len(heads.made_by), len(heads.read_by)) == (4, 16, 3, 1)
    assert (dimensions.size, dimensions.width, dimensions.read_by) == (16, 4, ())
    assert len(rows[0].crossing) == 5


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("quantized_already", "3 x its weights are quantized already ("),
        ("weights_as_inputs", "4 x its weight '...' is also an input of the model, and may be overridden ("),
    ],
)
def test_a_model_without_groups_says_why(tmp_path: Path, name: str, reason: str) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(models.to_bytes(models.load(zoo.build(name))))
    text = run("inspect", path, "--groups").stdout
    assert reason in text
    assert ("prune cleans up first" in text) == (name == "weights_as_inputs")


def test_a_model_that_cannot_be_traced_is_inspected_with_a_note(tmp_path: Path) -> None:
    result = run("inspect", mlp(tmp_path / "odd.onnx", operator="Unheard"), "--groups")
    assert "Channels not traced. ONNX Runtime" in result.stdout
    layerless = inspection.inspect(ir_fixed(), groups=True)
    assert layerless.notes[0] == "There are no channels: the model has no layer."


def test_an_input_that_is_no_tensor_is_inspected_and_cleaned_without_figures(tmp_path: Path) -> None:
    text = '<ir_version: 8, opset_import: ["": 17]> g (seq(float[2]) s) => (int64 n) { n = SequenceLength (s) }'
    path = tmp_path / "sequence.onnx"
    path.write_bytes(onnx.parser.parse_model(text).SerializeToString())
    assert "an input is no tensor" in inspection.inspect(path).notes[0]
    assert inspection.inspect(path, groups=True).notes[0] == "Not timed or traced: an input is no tensor."
    assert "an input is no tensor" in run("simplify", path).stdout


def test_passes_lists_each_with_a_line() -> None:
    text = run("passes").stdout
    for name, kind in passes().items():
        assert re.search(rf"^{name} +{re.escape(kind.summary)}$", text, re.MULTILINE)
    assert "quantize stands for" in text


# --- the frame ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", sorted(main.commands))
def test_every_command_and_option_has_help(command: str) -> None:
    assert run(command, "--help").stdout.startswith("Usage:")
    assert all(option.help for option in main.commands[command].params if getattr(option, "opts", ["x"])[0][0] == "-")


def test_choices_are_those_of_the_code() -> None:
    choices = {option.name: option.type for option in main.commands["quantize"].params}
    assert list(choices["scheme"].choices) == list(techniques.Scheme)  # type: ignore[attr-defined]
    assert list(choices["range_"].choices) == list(Range)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "option",
    [
        ("--max-drop", "much"),
        ("--max-latency", "5"),
        ("--min-speedup", "fast"),
        ("--max-size", "10"),
        ("--memory", "2"),
        ("--image-size", "4x"),
        ("--mean", "a,b"),
        ("--exclude", "("),
        ("--effort", "huge"),
        ("--batch", "0"),
        ("--threads", "-1"),
        ("--layout", "CHW"),
        ("--no-such", "1"),
    ],
)
def test_a_wrong_option_is_a_usage_error(option: tuple[str, str]) -> None:
    result = run("optimize", "m.onnx", *option, code=2)
    assert option[0] in result.stderr


def test_a_defect_is_one_line_and_its_traceback_only_verbose(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("oops\nmore")

    monkeypatch.setattr("onnxcomp.inspection.inspect", broken)
    result = run("inspect", model, code=1)
    assert result.stderr.startswith("Error: RuntimeError: oops\n")
    assert "please report" in result.stderr
    assert "Traceback" in CliRunner().invoke(main, ["inspect", str(model), "-v"]).stderr


def test_a_model_name_cannot_reach_the_terminal(tmp_path: Path) -> None:
    result = run("inspect", tmp_path / "\x1b[31mred.onnx", code=2)
    assert "\x1b" not in result.stderr
    assert "\\x1b[31mred.onnx" in result.stderr


def test_in_a_pipe_there_are_neither_colours_nor_bars_nor_warnings(model: Path, data: Path) -> None:
    done = subprocess.run(child("eval", model, "--eval", data), capture_output=True, text=True, check=True)
    assert "\x1b" not in done.stdout
    assert done.stderr == ""
    assert not any(line.endswith(" ") for line in done.stdout.splitlines())


def test_ctrl_c_leaves_nothing_behind(model: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scratch = model.parent / "scratch"
    scratch.mkdir()
    started = model.parent / "started"
    metric = model.parent / "slow.py"
    metric.write_text(
        f"import time, pathlib\ndef f(predict):\n    pathlib.Path({str(started)!r}).touch(); time.sleep(60)\n"
    )
    monkeypatch.setenv("TMPDIR", str(scratch))
    command = child("quantize", model, "--calib", data, "--eval", data, "--metric", f"{metric}:f", "--json", "r.json")
    usual = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # shells' background jobs ignore it
    with subprocess.Popen(
        command, cwd=model.parent, preexec_fn=usual, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as work:
        deadline = time.monotonic() + 60
        while not started.exists() and work.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        work.send_signal(signal.SIGINT)
        _, errors = work.communicate(timeout=30)
    assert (work.returncode, errors) == (130, "Interrupted.\n")
    assert [item.name for item in scratch.iterdir() if item.name != ".ses"] == []  # .ses is ONNX Runtime's own
    assert not model.with_name("tiny.opt.onnx").exists()
    assert not (model.parent / "r.json").exists()


def test_inputs_are_never_written_over(model: Path, data: Path) -> None:
    before = model.read_bytes(), data.read_bytes()
    on_data = run("quantize", model, "--calib", data, "-o", data, "--overwrite", code=2)
    on_model = run("inspect", model, "--json", model, code=2)
    twice = run("simplify", model, "-o", model.with_name("x.onnx"), "--json", model.with_name("x.onnx"), code=2)
    assert "is an input itself" in on_data.stderr
    assert "exists" in on_model.stderr
    assert "give another name to --json" in on_model.stderr
    assert "both to be" in twice.stderr
    assert before == (model.read_bytes(), data.read_bytes())


def test_a_page_goes_where_it_is_asked_for(model: Path, data: Path) -> None:
    page = model.with_name("page.html")
    quick = ["--calib", data, "--effort", "quick", "--threads", 1, "--report", page]
    plain = document(run("optimize", model, *quick, "--json", "-"))
    assert {layer["op"] for layer in plain["layers"]} >= {"Gemm"}
    text, figures = page.read_text(encoding="utf-8"), plain["result"]
    assert text.startswith("<!DOCTYPE html>")
    low, high = figures["speedup_interval"]
    assert low <= figures["speedup"] <= high
    assert re.search(r"<b>[\d.]+x (faster|slower) <i>\[[\d.]+x, [\d.]+x\]</i></b>", text)
    assert plain["command"].startswith("onnxcomp optimize ")
    assert "give another name to --report" in run("optimize", model, *quick, "--dry-run", code=2).stderr
    assert f"Wrote {page}" in run("optimize", model, *quick, "--overwrite").stdout
    page.unlink()
    assert "both to be" in run("optimize", model, *quick, "--json", page, "--overwrite", code=2).stderr
    assert not page.exists()


def test_a_report_takes_the_place_of_an_earlier_one(model: Path) -> None:
    report = model.with_name("report.json")
    assert [run("inspect", model, "--json", report).exit_code for _ in range(2)] == [0, 0]


def test_external_data_of_the_input_is_not_written_over(tmp_path: Path) -> None:
    source = mlp(tmp_path / "large.onnx")
    onnx.save(onnx.load(source), source, save_as_external_data=True, location="large.bin", size_threshold=0)
    before = (tmp_path / "large.bin").read_bytes()
    run("simplify", source, "-o", tmp_path / "large.bin", "--overwrite", code=2)
    assert (tmp_path / "large.bin").read_bytes() == before


def test_models_of_which_one_fixes_the_batch_are_compared_in_any_order(model: Path, data: Path, tmp_path: Path) -> None:
    fixed = onnx.load(model)
    for value in (*fixed.graph.input, *fixed.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 8
    path = tmp_path / "fixed.onnx"
    onnx.save(fixed, path)
    assert run("eval", model, path, "--eval", data).exit_code == 0
    assert run("eval", path, model, "--eval", data).exit_code == 0


def test_one_model_alone_and_a_metric_of_python(model: Path, data: Path) -> None:
    def always(predict: Any) -> float:
        return 0.5

    result = onnxcomp.evaluate(str(model), str(data), metric=always)
    assert (result.models[0].score, len(result.models)) == (0.5, 1)
    with pytest.raises(onnxcomp.errors.ModelError, match="int is not a model"):
        onnxcomp.simplify(3)  # type: ignore[arg-type]


@pytest.mark.parametrize("loop", [False, True])
def test_a_broken_graph_is_bad_input_everywhere(tmp_path: Path, loop: bool) -> None:
    text = "{ b = Relu (a) a = Relu (b) y = Add (x, a) }" if loop else "{ y = Add (x, lost) }"
    proto = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": 17]> g (float[2] x) => (float[2] y) {text}')
    path = tmp_path / "broken.onnx"
    onnx.save(proto, path)
    for command in ("simplify", "inspect", "bench", "optimize"):
        assert "not a valid ONNX graph" in run(command, path, code=2).stderr


def test_a_model_that_says_the_class_itself_has_an_accuracy(tmp_path: Path) -> None:
    graph = "g (float[n,4] x) => (int64[n] y) { y = ArgMax <axis=1, keepdims=0> (x) }"
    text = f'<ir_version: 8, opset_import: ["": 17]> {graph}'
    path, data = tmp_path / "argmax.onnx", tmp_path / "data.npz"
    onnx.save(onnx.parser.parse_model(text), path)
    x = np.random.default_rng(0).normal(size=(20, 4)).astype(np.float32)
    label = x.argmax(1)
    label[:5] = (label[:5] + 1) % 4
    np.savez(data, x=x, label=label)
    assert onnxcomp.evaluate(path, data).models[0].score == 0.75


def test_nan_in_weights_is_refused_everywhere(tmp_path: Path) -> None:
    broken = weights()
    broken["w1"][0, 0] = np.nan
    path = mlp(tmp_path / "nan.onnx", broken)
    for command in ("simplify", "bench", "optimize"):
        assert "NaN" in run(command, path, code=2).stderr


# --- prune ----------------------------------------------------------------------------------------------------------


def test_prune_shows_each_group_and_writes_its_saliency(tmp_path: Path) -> None:
    digits = ["prune", MODELS / "digits.onnx", "-o", tmp_path / "o.onnx", "--calib", MODELS / "digits_calib.npz"]
    how = ["--target", "params=60%", "--criterion", "l1", "--rates", "global", "--no-reconstruct", "--threads", 1]
    text = run(*digits, *how).stdout
    (step,) = (
        step
        for step in document(run(*digits, *how, "--overwrite", "--json", "-"))["steps"]
        if step["recipe"].startswith("Prune(")
    )
    assert "criterion=Criterion.L1" in step["recipe"]
    for width in step["widths"]:
        assert len(width["saliency"]) == width["size"] >= len(width["kept"])
        assert re.search(rf"{re.escape(width['group'])} +{width['size']} +{len(width['kept'])} ", text)


def test_prune_offers_every_criterion() -> None:
    assert list(Criterion) == _CRITERIA


@pytest.mark.parametrize("options", [(), ("--target", "flops=50%", "--threshold", "0.5")])
def test_prune_is_told_once_how_much(model: Path, options: tuple[str, ...]) -> None:
    result = run("prune", model, *options, code=2)
    assert "give either --target or --threshold" in result.stderr
