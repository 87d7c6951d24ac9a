"""What an encoding stores, and that stock ONNX Runtime makes the same weights of it, once, when it loads the model."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from numpy.typing import NDArray

from onnxcomp import model as models
from onnxcomp.decode import View
from onnxcomp.encodings import Codes, Encoded, Hashed, Masked, Sum
from onnxcomp.graph import Builder
from onnxcomp.unpacking import Stream, Unpacker, packed_bytes

RANDOM = np.random.default_rng(0)
CONV = View((6, 2, 3, 3), (6, 18), (0, 1))
MATMUL = View((10, 7), (10, 7), (1, 0))
TRANSPOSE = View((4, 3, 2, 2), (2, 2, 12), (0, 2, 1))
VIEWS = {"Conv": CONV, "MatMul": MATMUL, "ConvTranspose": TRANSPOSE}


def shape(view: View) -> tuple[int, int]:
    return int(np.prod(view.shape)) // view.columns, view.columns


def codes(view: View, count: int, books: int = 1, *, scaled: bool = False, length: int = 1) -> Codes:
    rows, columns = shape(view)
    indices = RANDOM.integers(count, size=(rows, columns // length)).astype(np.uint8)
    values = RANDOM.normal(size=(books, count, length)).astype(np.float32)
    return Codes(indices, values, RANDOM.normal(size=rows).astype(np.float32) if scaled else None)


def masked(view: View) -> Masked:
    mask = RANDOM.random(shape(view)) < 0.4
    return Masked(mask, RANDOM.normal(size=mask.sum()).astype(np.float32))


def masked_codes(view: View) -> Masked:
    mask = RANDOM.random(shape(view)) < 0.4
    return Masked(mask, RANDOM.normal(size=8).astype(np.float32), RANDOM.integers(8, size=mask.sum()).astype(np.uint8))


def hashed(view: View) -> Hashed:
    return Hashed(shape(view), RANDOM.normal(size=5).astype(np.float32), (123456789, 987654321, 55555))


Make: TypeAlias = Callable[[View], Encoded]

ENCODINGS: dict[str, Make] = {
    **{f"{count} values": partial(codes, count=count) for count in (2, 3, 4, 5, 6, 7, 8, 16, 32, 64, 128, 200, 256)},
    "a book by row": lambda view: codes(view, 4, shape(view)[0]),
    "scaled rows": lambda view: codes(view, 3, scaled=True),
    "mask": masked,
    "mask of codes": masked_codes,
    "hash": hashed,
    "sum": lambda view: Sum((codes(view, 2, scaled=True), codes(view, 2, scaled=True))),
}


def emitted(parts: list[tuple[Encoded, View]], opset: int, dtype: ir.DataType = ir.DataType.FLOAT) -> onnx.ModelProto:
    """A model that adds each weight to an input of its shape."""
    kind = "float" if dtype == ir.DataType.FLOAT else "float16"
    dims = [",".join(map(str, view.shape)) for _, view in parts]
    inputs = ", ".join(f"{kind}[{dim}] x{n}" for n, dim in enumerate(dims))
    outputs = ", ".join(f"{kind}[{dim}] y{n}" for n, dim in enumerate(dims))
    body = "\n".join(f"y{n} = Add(x{n}, x{n})" for n in range(len(parts)))
    model = ir.from_onnx_text(f'<ir_version: 7, opset_import: ["" : {opset}]> g ({inputs}) => ({outputs}) {{ {body} }}')
    nodes = list(model.graph)
    unpacker = Unpacker(Builder(model.graph), nodes[0])
    streams = [encoded.streams(view) for encoded, view in parts]
    integers = iter(unpacker.unpacked([stream for each in streams for stream in each]))
    for (encoded, view), own, node in zip(parts, streams, nodes, strict=True):
        node.replace_input_with(1, encoded.emit(unpacker, [next(integers) for _ in own], view, dtype))
    return onnx.load_from_string(models.to_bytes(model))


def loaded(proto: onnx.ModelProto, tmp_path: Path) -> tuple[list[NDArray[Any]], list[str]]:
    """The weights as ONNX Runtime sees them, and the operators that are left after it has loaded the model."""
    onnx.checker.check_model(proto, full_check=True)
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    kinds = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
    found: Any = session.run(
        None, {given.name: np.zeros(given.shape, kinds[given.type]) for given in session.get_inputs()}
    )
    return found, [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("make", ENCODINGS.values(), ids=ENCODINGS)
@pytest.mark.parametrize("opset", [13, 18, 21])
def test_sessions_fold_the_decoding(make: Make, view: View, opset: int, tmp_path: Path) -> None:
    encoded = make(view)
    found, operators = loaded(emitted([(encoded, view)], opset), tmp_path)
    np.testing.assert_allclose(view.matrix(found[0]), encoded.decoded(), rtol=1e-6, atol=1e-6)  # float32, summed
    assert operators == ["Add"]


def test_vectors_are_codewords(tmp_path: Path) -> None:
    encoded = codes(CONV, 16, length=9)
    found, operators = loaded(emitted([(encoded, CONV)], 13), tmp_path)
    np.testing.assert_allclose(CONV.matrix(found[0]), encoded.decoded())
    assert operators == ["Add"]
    assert encoded.bytes == 6 * 2 // 2 + 16 * 9 * 4


def test_weights_are_unpacked_together(tmp_path: Path) -> None:
    parts: list[tuple[Encoded, View]] = [(make(view), view) for make in ENCODINGS.values() for view in VIEWS.values()]
    proto = emitted(parts, 13)
    found, operators = loaded(proto, tmp_path)
    for (encoded, view), weight in zip(parts, found, strict=True):
        np.testing.assert_allclose(view.matrix(weight), encoded.decoded(), rtol=1e-6, atol=1e-6)  # float32, summed
    assert set(operators) == {"Add"}
    assert sum(node.op_type == "BitShift" for node in proto.graph.node) == 2 * 7  # whatever the number of weights


@pytest.mark.parametrize("make", ENCODINGS.values(), ids=ENCODINGS)
def test_half_precision(make: Make, tmp_path: Path) -> None:
    encoded = make(MATMUL)
    found, _ = loaded(emitted([(encoded, MATMUL)], 13, ir.DataType.FLOAT16), tmp_path)
    np.testing.assert_allclose(MATMUL.matrix(found[0]), encoded.decoded(), rtol=1e-3, atol=1e-3)  # 11 bits of mantissa


@pytest.mark.parametrize("make", ENCODINGS.values(), ids=ENCODINGS)
def test_the_file_holds_the_information_and_no_more(make: Make) -> None:
    view = View((64, 64, 3, 3), (64, 576), (0, 1))
    encoded = make(view)
    proto = emitted([(encoded, view)], 13)
    stored = sum(onnx.numpy_helper.to_array(tensor).nbytes for tensor in proto.graph.initializer)
    assert encoded.bytes <= stored <= encoded.bytes + 512  # shapes, shifts and other small integers


@pytest.mark.parametrize(("base", "bits"), [(2, 1), (3, 1.6), (4, 2), (5, 8 / 3), (6, 8 / 3), (7, 3), (8, 3), (256, 8)])
def test_bits_per_integer(base: int, bits: float) -> None:
    assert packed_bytes(120, base) == round(120 * bits / 8)
    assert Stream(np.zeros(120, np.uint8), base).bytes == round(120 * bits / 8)
