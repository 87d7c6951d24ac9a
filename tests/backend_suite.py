"""The ONNX backend tests of the installed `onnx` package: models that between them use nearly every operator.

`cases()` yields them all in a fixed order. With onnx 1.23: 1,884 node, 23 simple, 9 light, 82 pytorch-converted and
35 pytorch-operator, collected in five to seven seconds, nearly all of it onnx computing the node tests' data.
"""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import numpy_helper
from onnx.backend.test import loader

KINDS = ("node", "simple", "light", "pytorch-converted", "pytorch-operator")


@dataclass(frozen=True)
class BackendCase:
    """One model with inputs and the outputs expected for them.

    Attributes:
        name: unique over all kinds.
        kind: one of `KINDS`.
        model: the model; the weights of light models are made by nodes in the graph.
        inputs: a value per input that is not an initializer: an array, a list of arrays (a sequence) or None (an empty
            optional).
        outputs: the expected values, in the order of the graph's outputs.
        rtol: relative tolerance that the suite's authors grant.
        atol: absolute tolerance, likewise.
    """

    name: str
    kind: str
    model: onnx.ModelProto = field(repr=False)
    inputs: dict[str, Any] = field(repr=False)
    outputs: list[Any] = field(repr=False)
    rtol: float = 1e-3
    atol: float = 1e-7

    @property
    def feedable(self) -> bool:
        """Whether ORT's `run` takes the inputs as they are: arrays of numpy's own dtypes (no bfloat16, float8)."""
        return all(isinstance(value, np.ndarray) and value.dtype.isbuiltin == 1 for value in self.inputs.values())


def cases(kinds: Sequence[str] = KINDS) -> Iterator[BackendCase]:
    """Every backend test of the given kinds, sorted by name within each kind; of several data sets, the first."""
    for kind in kinds:
        # The light models are listed under "real", which is also where tests with a download would be.
        tests = loader.load_model_tests(kind="real" if kind == "light" else kind) if kind != "node" else _node_tests()
        for test in sorted(tests, key=lambda test: test.name):
            if kind == "node":
                model, (values, outputs) = test.model, test.data_sets[0]
                values, outputs = [_plain(value) for value in values], [_plain(value) for value in outputs]
            elif kind == "light":
                path = Path(onnx.__file__).parents[1] / test.url
                model = onnx.load(path)
                values = [_ramp(value.type.tensor_type) for value in _fed(model)]
                outputs = [_read(path.with_name(f"{path.stem}_output_0.pb"), model.graph.output[0])]
            else:
                folder = Path(test.model_dir)
                model = onnx.load(folder / "model.onnx")
                data = folder / "test_data_set_0"
                values = [_read(data / f"input_{i}.pb", info) for i, info in enumerate(_fed(model))]
                outputs = [_read(data / f"output_{i}.pb", info) for i, info in enumerate(model.graph.output)]
            inputs = {info.name: value for info, value in zip(_fed(model), values, strict=True)}
            yield BackendCase(test.name, kind, model, inputs, outputs, test.rtol, test.atol)


def ort_loads(model: onnx.ModelProto) -> str | None:
    """None where ONNX Runtime's CPU provider can load the model, else the first line of its reason."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # noqa: BLE001  (ORT raises about ten types that share no base class)
        return str(error).splitlines()[0]
    return None


def _node_tests() -> list[Any]:
    with warnings.catch_warnings():
        # Some node tests overflow or divide by zero on purpose while onnx computes their data.
        warnings.simplefilter("ignore", RuntimeWarning)
        return loader.load_model_tests(kind="node")


def _fed(model: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    """The inputs that a caller must feed: those without a default among the initializers."""
    defaults = {tensor.name for tensor in model.graph.initializer}
    return [info for info in model.graph.input if info.name not in defaults]


def _plain(value: Any) -> Any:
    """A node test's value as an array; some are TensorProtos or numpy scalars."""
    if isinstance(value, onnx.TensorProto):
        return numpy_helper.to_array(value)
    return np.asarray(value) if isinstance(value, np.generic) else value


def _read(path: Path, info: onnx.ValueInfoProto) -> Any:
    """The value in a `.pb` file, whose message type follows from the declared type."""
    content = path.read_bytes()
    match info.type.WhichOneof("value"):
        case "sequence_type":
            return numpy_helper.to_list(onnx.SequenceProto.FromString(content))
        case "optional_type":
            return numpy_helper.to_optional(onnx.OptionalProto.FromString(content))
        case _:
            return numpy_helper.to_array(onnx.TensorProto.FromString(content))


def _ramp(tensor: onnx.TypeProto.Tensor) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The light models' input: 0 up to 1 in equal steps; their expected outputs were computed on it."""
    shape = [dim.dim_value or 1 for dim in tensor.shape.dim]
    size = int(np.prod(shape))
    return (np.arange(size) / size).reshape(shape).astype(np.float32)
