"""A tiny model with data, and the commands run on them in process."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from click.testing import CliRunner, Result
from numpy.typing import NDArray
from onnxruntime import InferenceSession

from onnxcomp.cli import main

CLASSES = 4
NO_CACHE = {"ONNXCOMP_CACHE": "none"}


def run(*arguments: object, code: int = 0) -> Result:
    """Run a command; a traceback, or another exit code, is a failure."""
    result = CliRunner(env=NO_CACHE).invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def weights(seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {
        "w1": random.standard_normal((64, 8)).astype("f4"),
        "w2": random.standard_normal((CLASSES, 64)).astype("f4"),
    }


def mlp(path: Path, arrays: dict[str, Any] | None = None, operator: str = "Relu") -> Path:
    """Two Gemms with something between them, 8 features to 4 classes."""
    model = ir.from_onnx_text(
        f"""<ir_version: 8, opset_import: ["": 17]>
        tiny (float[batch,8] x, float[64,8] w1, float[{CLASSES},64] w2) => (float[batch,{CLASSES}] y)
        {{ h = Gemm <transB = 1> (x, w1)  a = {operator} (h)  y = Gemm <transB = 1> (a, w2) }}"""
    )
    proto = ir.to_proto(model)
    for name, array in (arrays or weights()).items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
        proto.graph.input.remove(next(value for value in proto.graph.input if value.name == name))
    path.write_bytes(proto.SerializeToString())
    return path


def samples(path: Path, count: int = 40, **changes: Any) -> Path:
    """Inputs, with the class that the model of `mlp` finds as their label."""
    x = np.random.default_rng(1).standard_normal((count, 8)).astype("f4")
    w = weights()
    label = (np.maximum(x @ w["w1"].T, 0) @ w["w2"].T).argmax(1)
    np.savez(path, **({"x": x, "label": label} | changes))
    return path


def outputs(path: Path, x: NDArray[Any]) -> NDArray[np.float64]:
    """What ONNX Runtime says."""
    return np.asarray(InferenceSession(path).run(None, {"x": x})[0], np.float64)


def child(*arguments: object) -> list[str]:
    """The same command as a process of its own."""
    return [sys.executable, "-m", "onnxcomp", *map(str, arguments)]
