"""Every model of the zoo is valid, runs, and is built the same twice; the shipped ones score what their README says."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from models import zoo

SMALL = [*zoo.BUILDERS, *zoo.PROTO_BUILDERS]
MODELS = Path(zoo.__file__).parent


def run(model: onnx.ModelProto | Path, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # an IR 3 model makes ORT warn about each of its weights
    options.intra_op_num_threads = 1
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs), strict=True))


@pytest.mark.parametrize("name", SMALL)
def test_model_is_valid_small_and_the_same_again(name: str) -> None:
    model = zoo.build(name)
    # The full check adds shape inference, in which onnx takes a sparse initializer for a value of sparse type.
    onnx.checker.check_model(model, full_check=name != "sparse_initializer")
    content = model.SerializeToString(deterministic=True)
    assert len(content) < 2e6
    assert content == zoo.build(name).SerializeToString(deterministic=True)


@pytest.mark.parametrize("name", [name for name in SMALL if name not in zoo.UNRUNNABLE])
@pytest.mark.parametrize("batch", [1, 3])
def test_outputs_have_the_declared_shapes_and_sane_values(name: str, batch: int) -> None:
    model = zoo.build(name)
    fixed = model.graph.input[0].type.tensor_type.shape.dim[0].dim_value
    outputs = run(model, zoo.feeds(model, fixed or batch))
    axes = {**zoo.AXES, "batch": batch, "height_2": 2 * zoo.AXES["height"], "width_2": 2 * zoo.AXES["width"]}
    for info in model.graph.output:
        value = outputs[info.name]
        assert list(value.shape) == [dim.dim_value or axes[dim.dim_param] for dim in info.type.tensor_type.shape.dim]
        if value.dtype == np.float32:
            assert np.isfinite(value).all()
            # Random layers neither kill the signal nor blow it up: what lossy passes do to it can then be measured.
            assert 0.01 < value.std() < 100


@pytest.mark.parametrize("name", zoo.UNRUNNABLE)
def test_unrunnable_models_are_refused(name: str) -> None:
    with pytest.raises(Exception, match="not a registered function/op"):
        run(zoo.build(name), {})


def test_opsets_span_nine_to_twentyone() -> None:
    opsets = {zoo.build(name).opset_import[0].version for name in SMALL}
    assert opsets == set(range(9, 22))


def test_each_oddity_is_there() -> None:
    assert len(zoo.build("weights_as_inputs").graph.input) > 10
    assert zoo.build("functions").functions[0].name == "DenseGelu"
    assert len(zoo.build("sparse_initializer").graph.sparse_initializer) == 1
    gpt = zoo.build("gpt").graph
    table = next(tensor.name for tensor in gpt.initializer if tensor.name.startswith("embedding"))
    assert [node.op_type for node in gpt.node if table in node.input] == ["Gather", "Transpose"]
    bodies = [attribute.g for node in zoo.build("control_flow").graph.node for attribute in node.attribute]
    assert sum(bool(body.initializer) for body in bodies) == 3


def test_hidden_tokens_do_not_change_the_answer() -> None:
    model = zoo.build("bert")
    inputs = zoo.feeds(model)
    inputs["attention_mask"][:, 6:] = 0
    changed = inputs | {"input_ids": np.where(inputs["attention_mask"] == 1, inputs["input_ids"], 7)}
    before, after = run(model, inputs)["pooler_output"], run(model, changed)["pooler_output"]
    np.testing.assert_array_equal(before, after)


def test_later_tokens_do_not_change_earlier_answers() -> None:
    model = zoo.build("gpt")
    ids = zoo.feeds(model)["input_ids"]
    changed = np.concatenate([ids[:, :6], (ids[:, 6:] + 1) % 100], axis=1)
    before, after = run(model, {"input_ids": ids})["logits"], run(model, {"input_ids": changed})["logits"]
    np.testing.assert_allclose(before[:, :6], after[:, :6], rtol=1e-5, atol=1e-5)  # float32 rounding
    assert not np.allclose(before[:, 6:], after[:, 6:])


# One sample of slack: another CPU may round a near tie the other way.
@pytest.mark.parametrize(("name", "right", "total"), [("digits", 593, 597), ("letters", 977, 1000)])
def test_shipped_models_score_what_the_readme_says(name: str, right: int, total: int) -> None:
    data = dict(np.load(MODELS / f"{name}_eval.npz"))
    labels = data.pop("label")
    logits = run(MODELS / f"{name}.onnx", data)["logits"]
    assert len(labels) == total
    assert abs((logits.argmax(axis=1) == labels).sum() - right) <= 1
    calibration = np.load(MODELS / f"{name}_calib.npz")
    assert {key: value.shape[1:] for key, value in data.items()} == {
        key: calibration[key].shape[1:] for key in calibration.files
    }


def test_digits_keeps_its_batch_norms() -> None:
    types = [node.op_type for node in onnx.load(MODELS / "digits.onnx").graph.node]
    assert types.count("BatchNormalization") == types.count("Conv") == 8


def test_letters_hides_padding_with_the_lowest_float() -> None:
    graph = onnx.load(MODELS / "letters.onnx").graph
    constants = [onnx.numpy_helper.to_array(node.attribute[0].t) for node in graph.node if node.op_type == "Constant"]
    assert any(np.array_equal(value, np.finfo(np.float32).min) for value in constants)
    assert {"Softmax", "Erf", "LayerNormalization", "Gather"} <= {node.op_type for node in graph.node}
