"""The gate: each limit is judged, and says so by exit code, JSON and JUnit XML; also as a step of a workflow."""

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import click
import jsonschema
import numpy as np
import onnx
import pytest
import yaml

import onnxcomp
from onnxcomp import runtime, verification
from onnxcomp.budget import Budget, Check
from onnxcomp.cli import main
from onnxcomp.errors import ModelError, OptionError
from onnxcomp.report import Figures
from onnxcomp.runtime import Protocol, Timing
from onnxcomp.verification import Verification, junit, verify
from tests.commands import mlp, run, samples, weights
from tests.test_report import ENVIRONMENT, SCHEMA

ROOT = Path(__file__).parents[1]


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second model takes half the time of the first, 2 ms."""

    def compare(sessions: Any, feeds: Any, protocol: Protocol) -> list[Timing]:
        return [Timing(t, t, t, s, s, s) for t, s in ((4e-3, 1.0), (2e-3, 2.0))]

    monkeypatch.setattr(runtime, "compare", compare)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return mlp(tmp_path / "tiny.onnx")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return samples(tmp_path / "data.npz")


@pytest.fixture
def worse(tmp_path: Path) -> Path:
    """A model of the same form that errs on some samples."""
    noise = np.random.default_rng(2)
    return mlp(
        tmp_path / "worse.onnx",
        {k: v + 0.5 * noise.standard_normal(v.shape).astype("f4") for k, v in weights().items()},
    )


def drop_of(worse: Path, model: Path, data: Path) -> float:
    first, second = onnxcomp.evaluate([model, worse], data).models
    return first.score - second.score


@pytest.mark.usefixtures("fast")
def test_all_limits_hold(model: Path, data: Path) -> None:
    limits = ["--max-drop", "1%", "--min-speedup", "1.5x", "--max-latency", "5ms", "--max-size", "100%"]
    result = run("verify", model, "--against", model, "--eval", data, *limits, "--json", "-")
    plain = json.loads(result.stdout)
    jsonschema.validate(plain, SCHEMA)
    assert plain["kind"] == "verification"
    assert plain["passed"]
    assert plain["metric"] == "accuracy"
    assert "40 samples" in plain["data"]
    size = model.stat().st_size
    assert {check["limit"]: (check["bound"], check["value"], check["passed"]) for check in plain["checks"]} == {
        "max-drop": (0.01, 0.0, True),
        "max-latency": (0.005, 0.002, True),
        "min-speedup": (1.5, 2.0, True),
        "max-size": (size, size, True),
    }
    text = run("verify", model, "--against", model, "--eval", data, *limits).stdout
    assert text.count("  passed  ") == 4
    assert "passed  min-speedup: speed-up is 2x, the limit is 1.5x" in text


@pytest.mark.usefixtures("fast")
@pytest.mark.parametrize(
    ("limit", "words"),
    [
        (["--max-drop", "1%"], "max-drop: accuracy drops by"),
        (["--min-speedup", "2.5x"], "min-speedup: speed-up is 2x, the limit is 2.5x"),
        (["--max-latency", "1ms"], "max-latency: latency is 2 ms, the limit is 1 ms"),
        (["--max-size", "100B"], "max-size: size is"),
        (["--max-size", "10%"], "max-size: size is"),
    ],
)
def test_one_broken_limit_fails_the_gate(
    model: Path, worse: Path, data: Path, tmp_path: Path, limit: list[str], words: str
) -> None:
    good = ["--min-speedup", "1x"] if limit[0] != "--min-speedup" else ["--max-size", "200%"]
    report = tmp_path / "r.json"
    options = ["--against", model, "--eval", data, *limit, *good, "--json", report, "--junit", tmp_path / "j.xml"]
    result = run("verify", worse, *options, code=3)
    assert f"FAILED  {words}" in result.stdout
    assert result.stdout.count("  passed  ") == 1
    assert words.partition(": ")[2] in result.stderr
    plain = json.loads(report.read_text())
    assert not plain["passed"]
    assert sorted(check["passed"] for check in plain["checks"]) == [False, True]
    root = ElementTree.parse(tmp_path / "j.xml").getroot()
    (suite,) = root
    assert (suite.get("tests"), suite.get("failures")) == ("2", "1")
    (failure,) = suite.iter("failure")
    assert words.partition(": ")[2] in str(failure.get("message"))


@pytest.mark.usefixtures("fast")
def test_the_drop_is_of_the_whole_evaluation_data(model: Path, worse: Path, tmp_path: Path) -> None:
    data = samples(tmp_path / "many.npz", 333)
    drop = drop_of(worse, model, data)
    assert drop > 0.01
    result = verify(worse, against=model, evaluation=data, budget=Budget(max_drop=drop))
    assert result.passed
    assert result.checks[0].value == pytest.approx(drop)
    assert result.original.score == 1.0
    assert "333 samples" in result.data
    assert not verify(worse, against=model, evaluation=data, budget=Budget(max_drop=drop - 0.004)).passed


@pytest.mark.usefixtures("fast")
def test_metrics_as_for_optimize(model: Path, worse: Path, data: Path, tmp_path: Path) -> None:
    unlabelled = tmp_path / "x.npz"
    np.savez(unlabelled, x=np.load(data)["x"])
    budget = Budget(max_drop=0.0)
    assert verify(worse, against=model, evaluation=unlabelled, budget=budget).metric == "relative-error"
    assert verify(worse, against=model, evaluation=data, budget=budget, metric="agreement").metric == "agreement"
    sqnr = verify(worse, against=model, evaluation=data, budget=Budget(max_drop=10), metric="sqnr")
    assert sqnr.metric == "relative-error"
    assert "infinite" in sqnr.notes[0]
    own = verify(worse, against=model, evaluation=data, budget=Budget(max_drop=1), metric=lambda predict: 0.5)
    assert own.passed


def test_it_really_measures(model: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verification, "_PROTOCOL", Protocol(block=2, rounds=3, warmup=1))
    result = verify(model, against=model, evaluation=data, budget=Budget(max_latency=100.0), batch=3)
    assert result.passed
    assert result.environment["batch"] == 3
    assert 0 < result.checks[0].value < 1


# --- bad input ------------------------------------------------------------------------------------------------------


def test_at_least_one_limit(model: Path, data: Path) -> None:
    assert "no limit was given" in run("verify", model, "--against", model, "--eval", data, code=2).stderr
    with pytest.raises(OptionError, match="no limit"):
        verify(model, against=model, evaluation=data, budget=Budget())
    assert "Missing option '--eval'" in run("verify", model, "--against", model, "--max-drop", "1%", code=2).stderr


def form(path: Path, head: str, body: str) -> Path:
    path.write_bytes(
        onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": 17]> g {head} {{ {body} }}').SerializeToString()
    )
    return path


@pytest.mark.parametrize(
    ("head", "body", "words"),
    [
        ("(float[n,8] z) => (float[n,8] y)", "y = Relu (z)", "takes 'z' float32[n, 8]"),
        ("(double[n,8] x) => (double[n,8] y)", "y = Relu (x)", "takes 'x' float64[n, 8]"),
        ("(float[n,9] x) => (float[n,9] y)", "y = Relu (x)", "takes 'x' float32[n, 9]"),
        ("(float[n] x) => (float[n] y)", "y = Relu (x)", "takes 'x' float32[n]"),
        ("(float[n,8] x) => (float[n,8] z)", "z = Relu (x)", "gives 'z' float32[n, 8]"),
        ("(float[n,8] x) => (float[n,8] y)", "y = Relu (x)", "gives 'y' float32[n, 8]"),
    ],
)
def test_models_that_are_not_versions_of_one(
    model: Path, data: Path, tmp_path: Path, head: str, body: str, words: str
) -> None:
    other = form(tmp_path / "other.onnx", head, body)
    message = run("verify", other, "--against", model, "--eval", data, "--max-drop", "1%", code=2).stderr
    assert words in message
    assert "not versions of one model" in message


def test_bad_input_is_told_before_anything_is_measured(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime, "compare", lambda *_: pytest.fail("measured"))
    gate = ["verify", model, "--against", model, "--eval", data, "--max-drop", "1%"]
    assert "does not exist" in run(*gate, "--junit", tmp_path / "none" / "j.xml", code=2).stderr
    assert "is an input itself" in run(*gate, "--junit", data, code=2).stderr
    other = tmp_path / "notes.txt"
    other.write_text("mine")
    for option in ("--junit", "--json"):
        message = run(*gate, option, other, code=2).stderr
        assert f"exists, and is no such report\n  remedy: give another name to {option}\n" in message
    assert other.read_text() == "mine"
    same = tmp_path / "r.xml"
    assert "both reports" in run(*gate, "--junit", same, "--json", same, code=2).stderr
    assert "no such file" in run("verify", tmp_path / "none.onnx", *gate[2:], code=2).stderr
    assert "no such file" in run(*gate[:3], tmp_path / "none.onnx", *gate[4:], code=2).stderr
    assert run(*gate, "--provider", "none", code=2)
    assert run(*gate[:4], "--eval", tmp_path / "none.npz", "--max-drop", "1%", code=2)
    with pytest.raises(ModelError):
        verify(b"nothing", against=model, evaluation=data, budget=Budget(max_drop=1))


@pytest.mark.usefixtures("fast")
def test_a_model_that_does_not_run_is_an_error(model: Path, data: Path, tmp_path: Path) -> None:
    text = "(float[n,8] x) => (float[n,4] y)"
    other = form(tmp_path / "other.onnx", text, "y = Mystery (x)")
    assert run("verify", other, "--against", model, "--eval", data, "--max-drop", "1%", code=2).stderr


@pytest.mark.usefixtures("fast")
def test_a_former_junit_file_is_replaced(model: Path, data: Path, tmp_path: Path) -> None:
    path = tmp_path / "j.xml"
    gate = ["verify", model, "--against", model, "--eval", data, "--min-speedup", "2", "--junit", path]
    run(*gate)
    first = path.read_text()
    run(*gate, "-q")
    assert path.read_text() == first


@pytest.mark.usefixtures("fast")
@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"model": "none.onnx"}, 2),
        ({"--eval": "none.npz"}, 2),
        ({"--provider": "quantum"}, 2),
        ({"--max-drop": "much"}, 2),
        ({"--threads": "-1"}, 2),
        ({}, 1),
    ],
)
def test_a_run_that_fails_leaves_no_former_report(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, str], code: int
) -> None:
    reports = [tmp_path / "j.xml", tmp_path / "r.json"]
    given = {"model": model, "--against": model, "--eval": data, "--max-drop": "1%"}

    def gate(given: dict[str, Any], code: int) -> None:
        options = [part for item in given.items() if item[0] != "model" for part in item]
        run("verify", given["model"], *options, "--junit", reports[0], "--json", reports[1], code=code)

    gate(given, 0)
    assert all(path.exists() for path in reports)
    if code == 1:
        monkeypatch.setattr(runtime, "compare", None)
    gate(given | change, code)
    assert not any(path.exists() for path in reports)


# --- JUnit ----------------------------------------------------------------------------------------------------------


def test_junit_is_valid_whatever_the_names() -> None:
    odd = '\x00\x1b<&"\ud800\ufffe]]>\n'
    checks = (Check("max-drop", 0.01, 0.02, False), Check("max-size", 10, 5, True))
    figures = Figures(10), Figures(5, 1e-3, (1e-3, 1e-3), 2.0, math.nan, None, math.nan)
    result = Verification(
        odd, odd, False, checks, *figures, f"mine:{odd}", odd, "medians", {**ENVIRONMENT, "machine": odd}
    )
    text = junit(result)
    root = ElementTree.fromstring(text.encode())
    (suite,) = root
    properties = {item.get("name"): item.get("value") for item in suite.iter("property")}
    assert properties["provider"] == "CPUExecutionProvider"
    assert '\\x00\\x1b<&"\\ud800\\ufffe]]>' in str(properties["machine"])
    cases = {case.get("name"): case for case in suite.iter("testcase")}
    assert cases.keys() == {"max-drop", "max-size"}
    assert cases["max-drop"].find("failure") is not None
    assert cases["max-size"].find("failure") is None
    jsonschema.validate(json.loads(json.dumps(result.to_json(), allow_nan=False)), SCHEMA)


def test_what_is_no_number_passes_no_limit() -> None:
    before = Figures(10)
    after = Figures(10, math.nan, None, math.nan, math.nan, None, math.nan)
    for figures in (after, Figures(11)):
        budget = Budget(1, 1, 1, 10, max_memory=10**12)
        checks = list(budget.checks(before, dataclasses.replace(figures, size=11)))
        assert [check.passed for check in checks] == [False] * 5


# --- in a workflow --------------------------------------------------------------------------------------------------

ACTION = yaml.safe_load((ROOT / "action.yml").read_text())
STEP = next(step for step in ACTION["runs"]["steps"] if step.get("id") == "verify")


def step(folder: Path, **inputs: Any) -> subprocess.CompletedProcess[str]:
    """What a runner does with the step: inputs become the environment, and bash runs the script."""
    given = {name: str(item.get("default", "")) for name, item in ACTION["inputs"].items()}
    given |= {name.replace("_", "-"): str(value) for name, value in inputs.items()}
    environment = {
        key: given[text.removeprefix("${{ inputs.").removesuffix(" }}")] for key, text in STEP["env"].items()
    }
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", STEP["run"]]
    variables = dict(os.environ) | environment | {"PATH": path}
    return subprocess.run(command, env=variables, cwd=folder, capture_output=True, text=True, check=False)


def test_the_action_gives_the_exit_codes_of_the_gate(model: Path, data: Path, tmp_path: Path) -> None:
    given = {"model": model, "against": model, "eval": data}
    passed = step(tmp_path, **given, max_drop="1%", max_size="100%")
    assert passed.returncode == 0, passed.stderr
    assert (tmp_path / "onnxcomp-verify.xml").read_text().startswith("<?xml")
    assert step(tmp_path, **given, max_size="1%").returncode == 3
    assert step(tmp_path, **given).returncode == 2
    assert step(tmp_path, **given | {"model": tmp_path / "none.onnx"}, max_drop="1%").returncode == 2


def test_inputs_of_the_action_are_never_run(model: Path, data: Path, tmp_path: Path) -> None:
    odd = tmp_path / "a b; touch owned; $(touch owned) `touch owned` '\".onnx"
    odd.write_bytes(model.read_bytes())
    given = {"against": model, "eval": data, "max_size": "100%"}
    assert step(tmp_path, model=odd, **given).returncode == 0
    for hostile in ('"; touch owned; "', "$(touch owned)", "--junit=owned", "--help"):
        assert step(tmp_path, model=hostile, **given).returncode == 2
        assert step(tmp_path, model=model, **given | {"metric": hostile}).returncode == 2
    assert not (tmp_path / "owned").exists()
    for item in ACTION["runs"]["steps"]:
        assert "${{" not in item.get("run", "")


def test_the_action_gives_every_option_of_the_command() -> None:
    options = {option.opts[0] for option in main.commands["verify"].params if isinstance(option, click.Option)}
    given = dict(re.findall(r'^add (--[a-z-]+) "\$([A-Z_]+)"$', STEP["run"], re.MULTILINE))
    assert given.keys() == options - {"-q", "-v"}
    for option, variable in given.items():
        assert STEP["env"][variable] == f"${{{{ inputs.{option.removeprefix('--')} }}}}"


def test_every_input_of_the_action_is_used_and_the_example_gives_only_these() -> None:
    used = " ".join([*STEP["env"].values(), json.dumps(ACTION["runs"]["steps"])])
    assert all(f"inputs.{name}" in used for name in ACTION["inputs"])
    workflow = yaml.safe_load((ROOT / "docs" / "examples" / "verify.yml").read_text())
    (job,) = workflow["jobs"].values()
    given = next(item["with"] for item in job["steps"] if "/onnxcomp@" in item["uses"])
    required = {name for name, item in ACTION["inputs"].items() if item.get("required")}
    assert required <= given.keys() <= ACTION["inputs"].keys()
