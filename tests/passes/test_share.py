"""Shared weights: what they cost in accuracy, what they take in the file, and that any kind of weight can be shared."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from models import zoo
from onnxcomp import model as models
from onnxcomp.core import Context, Pass, node_pattern
from onnxcomp.data import open_dataset
from onnxcomp.effects import Answers
from onnxcomp.errors import OptionError
from onnxcomp.layers import layers
from onnxcomp.passes.binarize import Binarize
from onnxcomp.passes.quantize_dynamic import QuantizeDynamic
from onnxcomp.passes.quantize_static import QuantizeStatic
from onnxcomp.passes.share import Method, Share
from onnxcomp.passes.sparsify import Choose, Sparsify
from onnxcomp.runtime import Target
from tests.lab import WIDTH
from tests.lab import network as chain
from tests.passes.small import context, error, network


def optimized(model: ir.Model, tmp_path: Path) -> list[str]:
    """The operators that are left after stock ONNX Runtime has loaded a model."""
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    ort.InferenceSession(models.to_bytes(model), options, providers=["CPUExecutionProvider"])
    return [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]


SETTINGS: dict[str, tuple[Pass, float]] = {  # with the share of the original's bytes that is too much
    "4 bits": (Share(4), 0.20),
    "3 bits": (Share(3), 0.17),
    "4 bits by 8 channels": (Share(4, channels=8), 0.23),
    "vectors": (Share(2, Method.PRODUCT), 0.16),
    "hash": (Share(8, Method.HASH), 0.36),
    "ternary": (Binarize(ternary=True), 0.14),
    "two bases": (Binarize(bases=2), 0.18),
    "2:4": (Sparsify(0.5, 4), 0.6),
    "blocks": (Sparsify(0.75, 0, (2, 2)), 0.36),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_it_beats_the_textbook_folds_at_load_and_takes_few_bytes(name: str, tmp_path: Path) -> None:
    technique, share = SETTINGS[name]
    aware, plain = technique(network(), context()).model, technique(network(), Context()).model
    assert error(network(), aware) < 0.8 * error(network(), plain)
    assert models.file_bytes(aware) < share * models.file_bytes(network())
    before, after = optimized(network(), tmp_path), optimized(aware, tmp_path)
    assert after == before


def test_everything_is_reported() -> None:
    first = next(iter(layers(network()))).name
    outcome = Share(4)(network(), context(exclude=node_pattern(f"^{first}$")))
    treated = {change.node for change in outcome.changes}
    left = {skip.node for skip in outcome.skips}
    assert treated | left >= {layer.name for layer in layers(network())}
    assert first in left - treated
    assert all("bits" in change.what or change.what == "fitted again" for change in outcome.changes)


def test_the_same_seed_gives_the_same_bytes() -> None:
    for technique in (Share(2, Method.PRODUCT), Sparsify()):
        first, second = (technique(network(), context(8)).model for _ in range(2))
        assert models.to_bytes(first) == models.to_bytes(second)


@pytest.mark.parametrize("name", ["gpt", "bert", "lstm_tagger", "gru_tagger", "unet", "fp16_weights", "control_flow"])
@pytest.mark.parametrize("technique", [Share(4), Share(8, Method.HASH), Binarize(bases=3), Sparsify(0.5)], ids=repr)
def test_weights_of_every_kind(technique: Pass, name: str, tmp_path: Path) -> None:
    """Embeddings, recurrent and transposed weights, half precision, bodies of control flow."""
    model = models.load(zoo.build(name))
    outcome = technique(model, Context())
    if not outcome.modified:
        assert all("bytes" in skip.reason for skip in outcome.skips)
        return
    assert models.file_bytes(outcome.model) < models.file_bytes(model)
    assert error(model, outcome.model) < (0.5 if technique != Share(8, Method.HASH) else 4)  # chance is a poor guide
    assert "BitShift" not in optimized(outcome.model, tmp_path)


def test_a_tied_embedding_is_stored_once() -> None:
    """The output layer of the model reads the table transposed."""
    model = models.load(zoo.build("gpt"))
    shared = Share(4)(model, Context()).model
    (lookup,) = [node for node in shared.graph if node.op_type == "Gather" and "ids" in str(node.inputs[1])]
    table = lookup.inputs[0]
    assert table is not None
    assert any(use.node.op_type == "Transpose" for use in table.uses())


def test_sparse_weights_stay_sparse() -> None:
    sparse = Sparsify(0.8, choose=Choose.MAGNITUDE)(network(), context()).model
    shared = Share(4)(sparse, context())
    assert models.file_bytes(shared.model) < 0.8 * models.file_bytes(Share(4)(network(), context()).model)
    assert any("zero" in change.what for change in shared.changes)
    assert error(network(), shared.model) < 4 * error(network(), sparse)


def test_integers_share_values_too(tmp_path: Path) -> None:
    quantized = QuantizeStatic()(network(), context()).model
    shared = Share(4)(quantized, context()).model
    assert models.file_bytes(shared) < 0.75 * models.file_bytes(quantized)
    assert error(network(), shared) < 0.05
    assert optimized(shared, tmp_path).count("QLinearConv") == optimized(quantized, tmp_path).count("QLinearConv")


@pytest.mark.parametrize("quantize", [QuantizeStatic(), QuantizeDynamic()], ids=["static", "dynamic"])
def test_integers_share_what_their_inputs_need(quantize: Pass) -> None:
    """By the inputs of the layer that multiplies by them, whatever they are read by."""
    model = chain(("a", "b", "c"))
    random = np.random.default_rng(2)
    x = random.standard_normal((256, 4)) @ random.standard_normal((4, WIDTH))  # much alike
    data = open_dataset({"x": x.astype(np.float32)}, models.input_specs(model))
    known = Context(data, Target(threads=1))
    quantized, answers = quantize(model, known).model, Answers(model, data, known)
    aware, plain = (answers.error(Share(2)(quantized, own).model) for own in (known, replace(known, data=None)))
    assert aware < 0.4 * plain
    assert aware < 10 * answers.error(quantized) + 0.05


HALVES = """<ir_version: 10, opset_import: ["" : 19]> g (float16[n, 64] x) => (float16[n, 64] y)
    { f = DequantizeLinear(w, s) y = MatMul(x, f) }"""
IMAGE = """<ir_version: 10, opset_import: ["" : 17]> g (float[n, 64, 1, 1] x) => (float[n, 64, h, v] y)
    { f = DequantizeLinear(w, s) u = ConvTranspose <group = 64, strides = [2, 2]> (f, k) y = Mul(u, x) }"""


@pytest.mark.parametrize(("text", "shape"), [(HALVES, (64, 64)), (IMAGE, (1, 64, 8, 8))], ids=["float16", "an image"])
def test_integers_of_any_use_can_be_shared(text: str, shape: tuple[int, ...]) -> None:
    """Halves are multiplied by halves; a constant image is no weight of the layer that it goes through."""
    proto, random = onnx.parser.parse_model(text), np.random.default_rng(0)
    dtype = np.float16 if text == HALVES else np.float32
    arrays = {"w": random.integers(-127, 128, shape).astype(np.int8), "s": np.array(0.01, dtype)}
    arrays |= {"k": random.normal(size=(64, 1, 2, 2)).astype(np.float32)} if text == IMAGE else {}
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in arrays.items())
    model = models.load(proto)
    x = random.normal(size=(20, 64, 1, 1) if text == IMAGE else (20, 64)).astype(dtype)
    known = Context(open_dataset({"x": x}, models.input_specs(model)), Target(threads=1))
    outcome = Share(4)(model, known)
    assert any("16 shared values" in change.what for change in outcome.changes)
    assert known.data is not None
    assert Answers(model, known.data, known).error(outcome.model) < 0.05


def test_what_gains_nothing_is_left() -> None:
    once = Share(2)(network(), Context()).model
    again = Share(8)(once, Context())
    assert not again.modified
    assert all("bytes" in skip.reason for skip in again.skips)


@pytest.mark.parametrize(
    "build",
    [
        lambda: Share(0),
        lambda: Share(9),
        lambda: Share(4, Method.HASH, 2),
        lambda: Share(4, channels=0),
        lambda: Binarize(bases=5),
        lambda: Binarize(ternary=True, bases=2),
        lambda: Sparsify(1.0),
        lambda: Sparsify(0.3, 4),
        lambda: Sparsify(0.5, block=(0, 1)),
    ],
)
def test_settings_that_make_no_sense_are_refused(build: Any) -> None:
    with pytest.raises(OptionError):
        build()


def test_codebooks_of_several_runs_of_rows_are_not_taken_for_weights() -> None:
    """They are tables that a Gather reads, as embeddings are."""
    once = Share(4, channels=8)(network(), Context()).model
    again = Share(2, channels=8)(once, Context())
    assert {change.node for change in again.changes} == {layer.name for layer in layers(network())}
