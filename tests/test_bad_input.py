"""Whatever is wrong with what the user gives, the answer is a documented exit code and a message that names it."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.external_data_helper
import pytest

from tests.commands import mlp, run, samples, weights


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return mlp(tmp_path / "tiny.onnx")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return samples(tmp_path / "data.npz")


def refused(*arguments: object, code: int = 2) -> str:
    """The message of a command that fails, after which nothing was written."""
    folder = Path(str(arguments[1])).parent
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if "__pycache__" not in path.parts}
    result = run(*arguments, code=code)
    after = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if "__pycache__" not in path.parts}
    assert after == before
    assert result.stdout == ""
    assert result.stderr.startswith("Error: ")
    return result.stderr


# --- models ---------------------------------------------------------------------------------------------------------

COMMANDS = ["simplify", "inspect", "bench"]


@pytest.mark.parametrize("command", COMMANDS)
def test_not_a_model(tmp_path: Path, command: str) -> None:
    path = tmp_path / "m.onnx"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\n")
    assert f"{path} is not an ONNX model" in refused(command, path)
    path.write_bytes(b"")
    assert f"{path} is not an ONNX model" in refused(command, path)


@pytest.mark.parametrize("command", COMMANDS)
def test_no_file_and_a_folder(tmp_path: Path, command: str) -> None:
    assert "no such file" in refused(command, tmp_path / "m.onnx")
    (tmp_path / "folder.onnx").mkdir()
    assert "is a folder, not a model" in refused(command, tmp_path / "folder.onnx")


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("share", [0.2, 0.5, 0.99])
def test_truncated_model(model: Path, command: str, share: float) -> None:
    content = model.read_bytes()
    model.write_bytes(content[: int(share * len(content))])
    message = refused(command, model)
    assert "not an ONNX model" in message
    assert "truncated" in message


def outside(model: Path) -> onnx.ModelProto:
    """The model with its tensors in `weights.bin` beside it."""
    proto = onnx.load(model)
    onnx.external_data_helper.convert_model_to_external_data(proto, location="weights.bin", size_threshold=0)
    onnx.save(proto, model)
    return onnx.load(model, load_external_data=False)


def test_external_data_missing_or_truncated(model: Path) -> None:
    outside(model)
    store = model.with_name("weights.bin")
    store.write_bytes(store.read_bytes()[:-1])
    assert "external data 'weights.bin' is truncated" in refused("simplify", model)
    store.unlink()
    message = refused("simplify", model)
    assert "needs its external data 'weights.bin', which is missing" in message
    assert "copy 'weights.bin' beside it" in message


@pytest.mark.parametrize("location", ["../weights.bin", "/etc/hostname", "sub/../../weights.bin"])
def test_external_data_outside_the_models_folder(tmp_path: Path, location: str) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    model = mlp(folder / "m.onnx")
    proto = outside(model)
    (tmp_path / "weights.bin").write_bytes((folder / "weights.bin").read_bytes())
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    model.write_bytes(proto.SerializeToString())
    assert f"points to external data outside its folder: '{location}'" in refused("quantize", model, "--calib", "x.npz")


def test_a_model_that_onnx_runtime_cannot_load(tmp_path: Path) -> None:
    model = mlp(tmp_path / "m.onnx", operator="Unheard")
    for command in ("simplify", "bench"):
        assert "does not load the model" in refused(command, model)


@pytest.mark.parametrize("scheme", ["int8", "int8-dynamic", "int4-weights"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite(tmp_path: Path, scheme: str, value: float) -> None:
    arrays = weights()
    arrays["w2"][1, 2] = value
    model = mlp(tmp_path / "m.onnx", arrays)
    message = refused("quantize", model, "--scheme", scheme, "--calib", samples(tmp_path / "d.npz"))
    assert "weight 'w2' of Gemm" in message
    assert "holds NaN or infinity" in message


# --- data -----------------------------------------------------------------------------------------------------------

X = np.ones((5, 8), "f4")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": np.ones((5, 7), "f4")}, "input 'x' has shape [1, 7], the model takes [batch, 8]"),
        ({"x": np.ones(5, "f4")}, "input 'x' has shape [1], the model takes [batch, 8]"),
        ({"x": np.ones((5, 8), "i8")}, "input 'x' is int64, the model takes float32"),
        ({"x": np.full((5, 8), np.nan, "f4")}, "input 'x' holds nan at [0, 0]"),
        ({"x": np.full((5, 8), np.inf, "f4")}, "input 'x' holds inf at [0, 0]"),
        ({"x": np.ones((5, 8))}, "give 'x' as .astype('float32')"),
        ({"x": np.ones((0, 8), "f4"), "label": np.ones(0, "i8")}, "holds no samples"),
    ],
)
@pytest.mark.parametrize("option", ["--calib", "--eval"])
def test_data_that_do_not_fit(model: Path, changes: dict[str, Any], message: str, option: str) -> None:
    bad = samples(model.with_name("bad.npz"), 5, **changes)
    assert message in refused("quantize", model, "--scheme", "int8-dynamic", option, bad)


def test_nan_further_down_the_data(model: Path) -> None:
    x = X.copy()
    x[3, 4] = np.nan
    bad = samples(model.with_name("bad.npz"), 5, x=x)
    assert "sample 3 of" in refused("quantize", model, "--calib", bad)
    assert "sample 3 of" in refused("eval", model, "--eval", bad)


def test_a_wrong_name_in_the_data(model: Path) -> None:
    bad = model.with_name("bad.npz")
    np.savez(bad, X=X)
    message = refused("eval", model, "--eval", bad)
    assert "there is no key for input 'x'" in message
    assert "name the array 'x'" in message


def test_data_that_are_not_there_or_not_data(model: Path, tmp_path: Path) -> None:
    assert "there is no" in refused("eval", model, "--eval", tmp_path / "none.npz")
    (tmp_path / "empty").mkdir()
    assert "holds no samples" in refused("eval", model, "--eval", tmp_path / "empty")
    broken = tmp_path / "broken.npz"
    broken.write_bytes(b"PK no zip")
    assert str(broken) in refused("eval", model, "--eval", broken)


def test_labels_that_do_not_fit(model: Path) -> None:
    bad = samples(model.with_name("bad.npz"), 5, label=np.full(5, 9))
    assert "label 9 is not one of the model's 4 classes" in refused("eval", model, "--eval", bad)
    bad = samples(model.with_name("bad.npz"), 5, label=np.ones(5, "f4"))
    assert "'label' is float32, not an integer" in refused("eval", model, "--eval", bad, "--metric", "accuracy")


def test_int8_without_calibration_data(model: Path) -> None:
    message = refused("quantize", model)
    assert "scheme int8 needs calibration data" in message
    assert "add --calib" in message


# --- output ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["simplify", "share"])
def test_a_target_that_cannot_be_written(model: Path, command: str) -> None:
    def message(output: Path) -> str:
        return refused(command, model, "-o", output)

    assert "does not exist" in message(model.parent / "none" / "o.onnx")
    assert "is an input itself" in message(model)
    assert "is no regular file" in message(Path("/dev/null"))
    assert "is a folder" in message(model.parent)
    model.with_name("there.onnx").touch()
    assert "add --overwrite" in message(model.with_name("there.onnx"))


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder(model: Path) -> None:
    model.parent.chmod(0o555)
    try:
        assert "Permission denied" in refused("simplify", model)
    finally:
        model.parent.chmod(0o755)


# --- metrics and targets --------------------------------------------------------------------------------------------


def test_an_unknown_metric(model: Path, data: Path) -> None:
    message = refused("eval", model, "--eval", data, "--metric", "acuracy")
    assert "unknown metric 'acuracy'" in message
    assert "did you mean 'accuracy'?" in message
    assert "no such file" in refused("eval", model, "--eval", data, "--metric", "none.py:f")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("raise ValueError('not today')", "line.py:2, in f: raise ValueError('not today'): not today"),
        ("return predict({})", "metric"),
        ("return None", "returned NoneType, not a number"),
        ("return float('nan')", "returned NaN"),
        ("import sys; sys.exit(0)", "raised SystemExit"),
        ("return 1 +", "does not import: SyntaxError"),
    ],
)
def test_a_metric_that_fails(model: Path, data: Path, body: str, message: str) -> None:
    file = model.with_name("line.py")
    file.write_text(f"def f(predict):\n    {body}\n")
    assert message in refused("eval", model, "--eval", data, "--metric", f"{file}:f")


@pytest.mark.parametrize("command", ["simplify", "quantize", "bench", "inspect", "optimize"])
def test_a_provider_that_is_not_there(model: Path, command: str) -> None:
    message = refused(command, model, "--provider", "quantum")
    assert "execution provider 'quantum' is not available; available: " in message
    assert "cpu" in message


def test_an_unknown_command_is_a_usage_error() -> None:
    assert "No such command" in run("optimise", "m.onnx", code=2).stderr


def test_no_model_is_a_usage_error() -> None:
    assert "Missing argument" in run("bench", code=2).stderr
