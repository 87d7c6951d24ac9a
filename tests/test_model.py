"""Models in, models out: every kind of source, every bad one, and files that are whole or not there."""

import errno
import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from models import zoo
from onnxcomp import files, protos
from onnxcomp import model as models
from onnxcomp.errors import ModelError
from onnxcomp.runtime import Session

RUNNABLE = [name for name in [*zoo.BUILDERS, *zoo.PROTO_BUILDERS] if name not in zoo.UNRUNNABLE]


def linear(weight: onnx.TensorProto | None = None, **constant: Any) -> onnx.ModelProto:
    """y = x + w over [4]; w is an initializer, or a Constant node with the given attribute."""
    nodes = [helper.make_node("Add", ["x", "w"], ["y"], name="add")]
    if constant:
        nodes.insert(0, helper.make_node("Constant", [], ["w"], name="constant", **constant))
    if weight is None and not constant:
        weight = numpy_helper.from_array(np.arange(4, dtype=np.float32), "w")
    graph = helper.make_graph(
        nodes,
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [4])],
        [] if weight is None else [weight],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def outside(location: str, **entries: object) -> onnx.TensorProto:
    """A float tensor [4] stored in another file."""
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    for key, value in {"location": location, **entries}.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def written(folder: Path, proto: onnx.ModelProto) -> Path:
    path = folder / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    return path


def run(model: ir.Model, feeds: dict[str, Any]) -> dict[str, Any]:
    return dict(Session(model).run(feeds))


ZEROS = {"x": np.zeros(4, np.float32)}


# In


@pytest.mark.parametrize("give", [str, Path, Path.read_bytes, onnx.load, lambda path: ir.load(path)])
def test_every_source_gives_the_same_model(give: Callable[[Path], models.ModelSource], tmp_path: Path) -> None:
    path = written(tmp_path, zoo.build("resnet"))
    assert models.to_bytes(models.load(give(path))) == models.to_bytes(models.load(path))


@pytest.mark.parametrize("name", RUNNABLE)
def test_load_and_write_keep_outputs_names_types_and_axes(name: str) -> None:
    proto = zoo.build(name)
    content = models.to_bytes(models.load(proto))
    again = onnx.ModelProto.FromString(content)
    assert models.to_bytes(models.load(again)) == content
    assert [str(v) for v in again.graph.input] == [str(v) for v in proto.graph.input]
    assert [str(v) for v in again.graph.output] == [str(v) for v in proto.graph.output]
    fixed = proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value
    feeds = zoo.feeds(proto, fixed or 2)
    expected = Session(models.load(content)).run(feeds)
    for output, value in run(models.load(proto), feeds).items():
        np.testing.assert_array_equal(value, expected[output])


def test_an_ir_model_is_cloned() -> None:
    given = ir.from_proto(linear())
    models.load(given).graph[0].name = "other"
    assert given.graph[0].name == "add"


def test_metadata_survive(tmp_path: Path) -> None:
    proto = linear()
    helper.set_model_props(proto, {"author": "someone", "stride": "32"})
    proto.producer_name, proto.doc_string = "trainer", "what it does"
    (path,) = models.save(models.load(proto), tmp_path / "out.onnx")
    again = onnx.load(path)
    assert {item.key: item.value for item in again.metadata_props} == {"author": "someone", "stride": "32"}
    assert (again.producer_name, again.doc_string) == ("trainer", "what it does")


def test_sparse_initializers_become_dense() -> None:
    proto = zoo.build("sparse_initializer")
    before = proto.SerializeToString(deterministic=True)
    model = models.load(proto)
    assert proto.SerializeToString(deterministic=True) == before
    sparse = proto.graph.sparse_initializer[0]
    dense = np.zeros(64 * 64, np.float32)
    dense[numpy_helper.to_array(sparse.indices)] = numpy_helper.to_array(sparse.values)
    tensor = model.graph.initializers[sparse.values.name].const_value
    assert tensor is not None
    np.testing.assert_array_equal(tensor.numpy().reshape(-1), dense)


@pytest.mark.parametrize("indices", [[1, 3], [[1], [3]]], ids=["linear", "by axis"])
def test_sparse_constants_become_dense(indices: list[Any]) -> None:
    values = numpy_helper.from_array(np.array([5, 6], np.float32), "values")
    places = numpy_helper.from_array(np.array(indices, np.int64), "places")
    model = models.load(linear(sparse_value=helper.make_sparse_tensor(values, places, [4])))
    np.testing.assert_array_equal(run(model, ZEROS)["y"], [0, 5, 0, 6])


def test_specs_say_names_types_and_axes() -> None:
    model = models.load(zoo.build("bert"))
    assert models.input_specs(model)[0] == models.TensorSpec("input_ids", np.dtype(np.int64), ("batch", "length"))
    words = models.input_specs(models.load(zoo.build("string_lookup")))[0]
    assert (words.name, words.dtype.hasobject, words.shape) == ("words", True, ("batch",))


def test_overridable_weights_are_no_inputs_to_feed() -> None:
    model = models.load(zoo.build("weights_as_inputs"))
    assert len(model.graph.inputs) > 10
    assert [spec.name for spec in models.input_specs(model)] == ["input"]


def test_sequence_inputs_have_no_spec() -> None:
    proto = linear()
    proto.graph.input[0].type.CopyFrom(helper.make_sequence_type_proto(proto.graph.input[0].type))
    with pytest.raises(ModelError, match="input 'x' is not a tensor"):
        models.input_specs(models.load(proto))


def test_untyped_tensors_have_no_spec() -> None:
    proto = linear()
    proto.graph.input[0].type.tensor_type.elem_type = TensorProto.UNDEFINED
    with pytest.raises(ModelError, match="input 'x' is not a tensor"):
        models.input_specs(models.load(proto))


def test_vocabularies_are_rows_of_the_tables() -> None:
    found = models.vocabularies(models.load(zoo.build("bert")))
    assert found["input_ids"] == 100
    assert "attention_mask" not in found


def test_tensor_bytes_counts_initializers_bodies_and_constants() -> None:
    assert models.tensor_bytes(models.load(linear())) == 16
    value = numpy_helper.from_array(np.zeros(4, np.float32))
    assert models.tensor_bytes(models.load(linear(value=value))) == 16
    bodies = models.load(zoo.build("control_flow"))
    main = [value.const_value for value in bodies.graph.initializers.values()]
    assert models.tensor_bytes(bodies) > sum(tensor.nbytes for tensor in main if tensor is not None)


# Bad sources


@pytest.mark.parametrize(
    ("content", "fact"),
    [
        (b"", "no graph"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "not an ONNX model"),
        (b"PK\x03\x04 a checkpoint", "not an ONNX model"),
        (onnx.ModelProto(ir_version=8).SerializeToString(), "no graph"),
        (linear().SerializeToString()[:-20], "not an ONNX model"),
    ],
    ids=["empty", "git lfs pointer", "zip", "no graph", "truncated"],
)
def test_what_is_no_model_is_refused(content: bytes, fact: str, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    for source in (path, content):
        for read in (models.load, models.fingerprint):
            with pytest.raises(ModelError, match=fact):
                read(source)


@pytest.mark.parametrize("length", range(0, 400, 7))
def test_a_file_cut_anywhere_is_refused_with_a_cause(length: int) -> None:
    with pytest.raises(ModelError) as caught:
        models.load(zoo.build("functions").SerializeToString()[:length])
    assert "truncated" in caught.value.cause


def test_paths_that_hold_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match="no such file"):
        models.load(tmp_path / "missing.onnx")
    with pytest.raises(ModelError, match="is a folder"):
        models.load(tmp_path)
    path = written(tmp_path, linear())

    def denied(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", denied)
    with pytest.raises(ModelError, match=r"cannot read .*Permission denied"):
        models.load(path)


def test_a_broken_graph_is_told_by_its_root_cause() -> None:
    proto = linear()
    proto.graph.initializer[0].data_type = 250
    with pytest.raises(ModelError, match="not a valid ONNX graph: 250 is not a valid DataType"):
        models.load(proto)


# External data


def test_external_data_are_read(tmp_path: Path) -> None:
    array = np.array([1, 2, 3, 4], np.float32)
    (tmp_path / "weights.bin").write_bytes(b"12345678" + array.tobytes())
    model = models.load(written(tmp_path, linear(outside("weights.bin", offset=8, length=16))))
    np.testing.assert_array_equal(run(model, ZEROS)["y"], array)
    assert len(onnx.ModelProto.FromString(models.to_bytes(model)).graph.initializer[0].raw_data) == 16


def test_external_data_of_attributes_are_read(tmp_path: Path) -> None:
    array = np.array([1, 2, 3, 4], np.float32)
    (tmp_path / "weights.bin").write_bytes(array.tobytes())
    model = models.load(written(tmp_path, linear(value=outside("weights.bin"))))
    np.testing.assert_array_equal(run(models.load(models.to_bytes(model)), ZEROS)["y"], array)


def test_external_data_need_a_path() -> None:
    with pytest.raises(ModelError, match=r"keeps tensors in 'weights.bin', but was not given as a path"):
        models.load(linear(outside("weights.bin")))


@pytest.mark.parametrize(
    ("tensor", "fact"),
    [
        (outside("missing.bin"), "'missing.bin', which is missing"),
        (outside("short.bin"), "'short.bin' is truncated"),
        (outside("weights.bin", offset=8), "'weights.bin' is truncated"),
        (outside("weights.bin", length=12), "no valid place"),
        (outside("weights.bin", offset=-4), "no valid place"),
        (outside("weights.bin", offset="many"), "no valid place"),
        (outside(""), "outside its folder"),
        (outside("../secret.bin"), "outside its folder"),
        (outside("below/../../secret.bin"), "outside its folder"),
        (outside("link.bin"), "outside its folder"),
        (outside("."), "which is missing"),
    ],
    ids=lambda value: "" if isinstance(value, str) else " ".join(entry.value for entry in value.external_data),
)
def test_bad_external_data_are_refused(tensor: onnx.TensorProto, fact: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret.bin").write_bytes(bytes(16))
    (folder / "weights.bin").write_bytes(bytes(16))
    (folder / "short.bin").write_bytes(bytes(12))
    (folder / "link.bin").symlink_to(tmp_path / "secret.bin")
    for proto in (linear(tensor), linear(value=tensor)):
        for read in (models.load, models.fingerprint):
            with pytest.raises(ModelError, match=fact):
                read(written(folder, proto))


def test_absolute_places_of_external_data_are_refused(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(bytes(16))
    with pytest.raises(ModelError, match="outside its folder"):
        models.load(written(tmp_path, linear(outside(str(tmp_path / "weights.bin")))))


def test_a_link_to_a_model_finds_the_data_beside_the_model(tmp_path: Path) -> None:
    folder = tmp_path / "real"
    folder.mkdir()
    (folder / "weights.bin").write_bytes(np.ones(4, np.float32).tobytes())
    link = tmp_path / "link.onnx"
    link.symlink_to(written(folder, linear(outside("weights.bin"))))
    np.testing.assert_array_equal(run(models.load(link), ZEROS)["y"], 1)


# Fingerprints


def test_fingerprint_is_of_the_content() -> None:
    proto = zoo.build("resnet")
    first = models.fingerprint(proto)
    assert first == models.fingerprint(proto.SerializeToString()) == models.fingerprint(zoo.build("resnet"))
    assert first == hashlib.sha256(proto.SerializeToString(deterministic=True)).hexdigest()
    proto.graph.initializer[0].raw_data = bytes(len(proto.graph.initializer[0].raw_data))
    assert models.fingerprint(proto) != first


def test_fingerprint_of_an_ir_model_is_stable() -> None:
    assert models.fingerprint(ir.from_proto(linear())) == models.fingerprint(ir.from_proto(linear()))


def test_fingerprint_covers_external_data(tmp_path: Path) -> None:
    data = tmp_path / "weights.bin"
    data.write_bytes(bytes(16))
    path = written(tmp_path, linear(outside("weights.bin")))
    first = models.fingerprint(path)
    data.write_bytes(bytes(15) + b"\x01")
    assert models.fingerprint(path) != first


# Out


def entries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_save_writes_one_file_with_the_same_bytes_each_time(tmp_path: Path) -> None:
    model = models.load(zoo.build("resnet"))
    target = tmp_path / "out.onnx"
    assert models.save(model, target) == (target,)
    assert target.read_bytes() == models.to_bytes(model)
    first = target.read_bytes()
    models.save(models.load(target), target, overwrite=True)
    assert target.read_bytes() == first
    assert entries(tmp_path) == ["out.onnx"]
    assert target.stat().st_mode & 0o777 == 0o666 & ~files._umask()


@pytest.mark.parametrize("name", ["resnet", "control_flow"])
def test_types_of_initializers_are_not_written_again(name: str) -> None:
    """As onnx_ir does."""
    for graph in protos.all_graphs(onnx.load_from_string(models.to_bytes(models.load(zoo.build(name))))):
        assert not {value.name for value in graph.value_info} & {tensor.name for tensor in graph.initializer}


@pytest.fixture
def tiny_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if nothing fitted one protobuf message."""
    monkeypatch.setattr(models, "PROTOBUF_LIMIT", 1 << 10)


@pytest.mark.usefixtures("tiny_limit")
@pytest.mark.parametrize("name", ["resnet", "control_flow", "functions", "shared_weights", "string_lookup"])
def test_large_models_keep_their_tensors_beside_them(name: str, tmp_path: Path) -> None:
    proto = zoo.build(name)
    model = models.load(proto)
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    target = tmp_path / "out.onnx"
    assert models.save(model, target) == (target, tmp_path / "out.onnx.data")
    assert entries(tmp_path) == ["out.onnx", "out.onnx.data"]
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before
    assert target.stat().st_size < models.tensor_bytes(model) / 2
    feeds = zoo.feeds(proto)
    for output, value in Session(model).run(feeds).items():  # the session takes the way over a file, too
        np.testing.assert_array_equal(Session(target).run(feeds)[output], value)
        np.testing.assert_array_equal(Session(models.load(target)).run(feeds)[output], value)
    contents = [path.read_bytes() for path in (target, tmp_path / "out.onnx.data")]
    models.save(models.load(target), target, overwrite=True)
    assert contents == [path.read_bytes() for path in (target, tmp_path / "out.onnx.data")]


@pytest.mark.usefixtures("tiny_limit")
def test_long_string_tensors_stay_in_the_file(tmp_path: Path) -> None:
    names = np.array([f"a class with the number {number}" for number in range(300)], object)
    graph = helper.make_graph(
        [helper.make_node("Gather", ["names", "i"], ["name"], name="look")],
        "strings",
        [helper.make_tensor_value_info("i", TensorProto.INT64, [])],
        [helper.make_tensor_value_info("name", TensorProto.STRING, [])],
        [numpy_helper.from_array(names, "names")],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    model = models.load(proto)
    target = models.save(model, tmp_path / "out.onnx")[0]
    for source in (model, models.load(target)):
        assert run(source, {"i": np.array(7)})["name"] == "a class with the number 7"


@pytest.mark.usefixtures("tiny_limit")
def test_what_does_not_fit_a_message_has_no_bytes() -> None:
    with pytest.raises(ModelError, match="2 GiB"):
        models.to_bytes(models.load(zoo.build("resnet")))


@pytest.mark.parametrize("limit", [1 << 31, 1 << 10], ids=["one file", "two files"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["disk", "ctrl-c"])
def test_a_failed_write_leaves_what_was_there(
    error: BaseException, limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "PROTOBUF_LIMIT", limit)
    target = tmp_path / "out.onnx"
    target.write_text("the old one")

    def fails(handle: int) -> None:
        raise error

    monkeypatch.setattr(os, "fsync", fails)
    expected = ModelError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected):
        models.save(models.load(zoo.build("resnet")), target, overwrite=True)
    assert entries(tmp_path) == ["out.onnx"]
    assert target.read_text() == "the old one"


def test_data_are_in_place_before_the_model_that_needs_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "PROTOBUF_LIMIT", 1 << 10)
    order: list[str] = []
    replace = Path.replace

    def noted(self: Path, target: Path) -> Path:
        order.append(target.name)
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", noted)
    models.save(models.load(zoo.build("resnet")), tmp_path / "out.onnx")
    assert order[-2:] == ["out.onnx.data", "out.onnx"]


def test_bad_targets_are_refused_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = models.load(linear())
    source = written(tmp_path, linear())
    with pytest.raises(ModelError, match=r"output folder .* does not exist"):
        models.save(model, tmp_path / "missing" / "out.onnx")
    with pytest.raises(ModelError, match="exists"):
        models.save(model, source)
    with pytest.raises(ModelError, match="is a folder"):
        models.save(model, tmp_path, overwrite=True)
    with pytest.raises(ModelError, match="is an input itself"):
        files.check_target(tmp_path / "." / "model.onnx", overwrite=True, inputs=(b"", str(source)))

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(tempfile, "mkstemp", refuse)  # root may write anywhere
    with pytest.raises(ModelError, match=r"cannot write to '.*': Permission denied\n  remedy: give another -o"):
        models.save(model, tmp_path / "out.onnx")
    with pytest.raises(ModelError, match="remedy: give another --report"):
        files.check_target(tmp_path / "page.html", overwrite=False, option="--report")
    assert entries(tmp_path) == ["model.onnx"]
    assert source.read_bytes() == linear().SerializeToString()


@pytest.mark.usefixtures("tiny_limit")
def test_existing_data_are_not_overwritten_unasked(tmp_path: Path) -> None:
    (tmp_path / "out.onnx.data").write_text("somebody's")
    with pytest.raises(ModelError, match=r"out.onnx.data' exists"):
        models.save(models.load(zoo.build("resnet")), tmp_path / "out.onnx")
    assert entries(tmp_path) == ["out.onnx.data"]


def test_reports_are_written_atomically_too(tmp_path: Path) -> None:
    target = tmp_path / "report.json"
    target.write_text("old")
    files.write_text("{}\n", target)
    assert target.read_text() == "{}\n"
    with pytest.raises(ModelError, match="does not exist"):
        files.write_text("", tmp_path / "missing" / "report.json")
