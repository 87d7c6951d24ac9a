"""Models in, models out: load, check, fingerprint, and write.

The model is an `onnx_ir.Model` throughout. Its tensors are shared between clones: replace them, never write into them.
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir import external_data

from onnxcomp import files, protos
from onnxcomp.errors import ModelError

ModelSource = str | os.PathLike[str] | bytes | onnx.ModelProto | ir.Model

PROTOBUF_LIMIT = 2**31 - 2**24
"""Bytes of tensors that still fit one protobuf message of 2 GiB, with room for the graph."""
_FEW = 8
"""Numbers of a tensor that may be a size or a factor."""


@dataclass(frozen=True)
class TensorSpec:
    """What a model says of one input or output.

    Attributes:
        name: the tensor's name.
        dtype: NumPy dtype (`object` for strings; ml_dtypes for bfloat16 and the like).
        shape: an int per fixed axis, a name or None per dynamic one; None where even the rank is unknown.
    """

    name: str
    dtype: np.dtype
    shape: tuple[int | str | None, ...] | None


def spec_of(value: ir.Value) -> TensorSpec | None:
    """The spec of a tensor value, or None for sequences, optionals and untyped values."""
    if not isinstance(value.type, ir.TensorType) or value.dtype in {None, ir.DataType.UNDEFINED}:
        return None
    dtype = np.dtype(object) if value.dtype == ir.DataType.STRING else value.dtype.numpy()
    shape = None if value.shape is None else tuple(d if isinstance(d, int) else d.value for d in value.shape)
    return TensorSpec(value.name or "", dtype, shape)


def free_inputs(model: ir.Model) -> list[ir.Value]:
    """The graph inputs that a caller must feed: those without an initializer."""
    return [value for value in model.graph.inputs if value.name not in model.graph.initializers]


def input_specs(model: ir.Model) -> tuple[TensorSpec, ...]:
    """Specs of the inputs that a caller must feed.

    Raises:
        ModelError: an input is not a tensor.
    """
    specs = []
    for value in free_inputs(model):
        spec = spec_of(value)
        if spec is None:
            raise ModelError(
                f"input '{value.name}' is not a tensor but {value.type}",
                "sequence, optional and map inputs cannot come from a data file",
                "export the model with tensor inputs",
            )
        specs.append(spec)
    return tuple(specs)


def load(source: ModelSource) -> ir.Model:
    """Read a model; what was given is never modified.

    Args:
        source: a path, the bytes of a file, an `onnx.ModelProto` or an `onnx_ir.Model`.

    Raises:
        ModelError: not a model, truncated, external data missing or outside the model's folder.
    """
    if isinstance(source, ir.Model):
        return source.clone()
    folder: Path | None = None
    name = "the model"
    if not isinstance(source, onnx.ModelProto | bytes | str | os.PathLike):
        raise ModelError(
            f"{type(source).__name__} is not a model",
            remedy="give a path, bytes, an onnx.ModelProto or an onnx_ir.Model",
        )
    if isinstance(source, onnx.ModelProto):
        proto = onnx.ModelProto()
        proto.CopyFrom(source)  # onnx_ir reads tensors in place, and writes new names into them
    elif isinstance(source, bytes):
        proto = protos.parse(source, name)
    else:
        path = Path(source)
        name, folder = str(path), path.resolve().parent
        proto = protos.parse(protos.read(path), name)
    protos.check_external(proto, folder, name)
    if folder is not None:
        protos.load_attributes(proto, folder)
    if protos.has_sparse(proto):
        proto = protos.densified(proto)
    try:
        model = ir.from_proto(proto)
    except Exception as error:
        raise ModelError(
            f"{name} is not a valid ONNX graph: {_innermost(error)}", "the exporter wrote a broken file"
        ) from error
    if folder is not None:
        external_data.set_base_dir(model.graph, folder)
    _check_graph(model, name)
    return model


def _check_graph(model: ir.Model, name: str) -> None:
    """Refuse what no clone could be made of: values that nothing computes, and nodes that wait for each other.

    Raises:
        ModelError: naming the value.
    """
    for node in model.graph.all_nodes():
        for value in node.inputs:
            known = value is None or value.producer() is not None or value.is_graph_input() or value.is_initializer()
            if not known and value is not None:
                raise ModelError(
                    f"{name} is not a valid ONNX graph: nothing computes '{value.name}', which node '{node.name}' "
                    f"({node.op_type}) reads",
                    "the exporter wrote a broken file, or a part of a model was cut out",
                )
    for graph in model.graphs():
        places = {node: place for place, node in enumerate(graph)}
        if all(places.get(above, -1) < place for node, place in places.items() for above in _above(node)):
            continue
        try:
            graph.sort()
        except ValueError as error:
            raise ModelError(
                f"{name} is not a valid ONNX graph: {error}", "the exporter wrote a broken file"
            ) from error


def _above(node: ir.Node) -> Iterator[ir.Node]:
    for value in node.inputs:
        producer = None if value is None else value.producer()
        if producer is not None:
            yield producer


def fingerprint(source: ModelSource) -> str:
    """SHA-256 (hex) of the model as given, external data of a path included.

    Raises:
        ModelError: as for `load`.
    """
    digest = hashlib.sha256()
    outside: list[Path] = []
    if isinstance(source, ir.Model):
        proto = _to_proto(source)
    elif isinstance(source, onnx.ModelProto):
        proto = source
    elif isinstance(source, bytes):
        proto = protos.parse(source, "the model")
    else:
        path = Path(source)
        proto, folder = protos.parse(protos.read(path), str(path)), path.resolve().parent
        protos.check_external(proto, folder, str(path))
        outside = sorted({folder / location for location, _, _ in protos.external_parts(proto, str(path))})
    digest.update(proto.SerializeToString(deterministic=True))
    for file in outside:
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def metadata(source: ModelSource) -> dict[str, str]:
    """The model's metadata by key; its tensors are not read.

    Raises:
        ModelError: not a model.
    """
    if isinstance(source, ir.Model):
        return dict(source.metadata_props)
    if isinstance(source, onnx.ModelProto):
        proto = source
    else:
        data, name = (source, "the model") if isinstance(source, bytes) else (protos.read(Path(source)), str(source))
        proto = protos.parse(data, name)
    return {entry.key: entry.value for entry in proto.metadata_props}


def tensor_bytes(model: ir.Model) -> int:
    """Bytes of all initializers and constant attributes, subgraphs and functions included."""
    total = 0
    waiting: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    while waiting:  # counted before each session: onnx_ir's own traversals and `as_tensor` take several times as long
        graph = waiting.pop()
        if isinstance(graph, ir.Graph):
            constants = (value.const_value for value in graph.initializers.values())
            total += sum(tensor.nbytes for tensor in constants if tensor is not None)
        for node in graph:
            for attribute in node.attributes.values():
                if attribute.type == ir.AttributeType.TENSOR and attribute.value is not None:
                    total += attribute.value.nbytes
                elif attribute.type == ir.AttributeType.GRAPH and attribute.value is not None:
                    waiting.append(attribute.value)
                elif attribute.type == ir.AttributeType.GRAPHS and attribute.value is not None:
                    waiting += attribute.value
    return total


def file_bytes(model: ir.Model) -> int:
    """Bytes of the model as `save` writes it; those of its tensors alone where they need a file of their own."""
    tensors = tensor_bytes(model)
    return tensors if tensors > PROTOBUF_LIMIT else len(to_bytes(model))


def all_nodes(model: ir.Model) -> Iterator[ir.Node]:
    """Every node of the graph, its control-flow bodies and its model-local functions."""
    yield from model.graph.all_nodes()
    for function in model.functions.values():
        yield from function.all_nodes()


def opset(model: ir.Model) -> int:
    """Version of the standard operator set; 0 where the model does not import it."""
    return model.opset_imports.get("", model.opset_imports.get("ai.onnx", 0))


def vocabularies(model: ir.Model) -> dict[str, int]:
    """Rows of the constant table that each integer input indexes: its elements must stay below."""
    result: dict[str, int] = {}
    for value in free_inputs(model):
        for node in _readers(value):
            if node.op_type == "Gather" and node.inputs[0] is not None and node.inputs[0].const_value is not None:
                rows = node.inputs[0].const_value.shape.numpy()[node.attributes.get_int("axis", 0)]
                result[value.name or ""] = min(rows, result.get(value.name or "", rows))
    return result


def _readers(value: ir.Value) -> Iterator[ir.Node]:
    """The nodes that read a value, seen through what only casts or reshapes it."""
    for use in value.uses():
        yield use.node
        if use.node.op_type in {"Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze", "Flatten"} and use.idx == 0:
            yield from _readers(use.node.outputs[0])


def to_bytes(model: ir.Model) -> bytes:
    """The model as one self-contained protobuf message, the same bytes for the same model.

    Raises:
        ModelError: the tensors do not fit one message of 2 GiB; `save` has no such limit.
    """
    if tensor_bytes(model) > PROTOBUF_LIMIT:
        raise ModelError("the model is larger than one protobuf message can be (2 GiB)", remedy="save it to a file")
    content: bytes = _to_proto(_in_memory(model)).SerializeToString(deterministic=True)
    return content


def content_hash(model: ir.Model) -> str:
    """SHA-256 (hex) over the graph and its tensors, the same for the same content."""
    return _hash(model, lambda tensor: True)


def structure_hash(model: ir.Model) -> str:
    """The same over all that decides how long a run takes: of weights and scales the types and shapes alone.

    So a model that was trained again has that of the one before. Few numbers, and integers along one axis, may be
    sizes, factors, or the zero points that decide which kernel runs: these count.
    """
    return _hash(
        model,
        lambda tensor: tensor.size <= _FEW or (tensor.dtype.is_integer() and len(tensor.shape) <= 1),
    )


def _hash(model: ir.Model, counts: Callable[[ir.TensorProtocol], bool]) -> str:
    """Over the graph, its tensors' types and shapes, and the numbers of those that count."""
    bare = model.clone()
    digest = hashlib.sha256()
    for value in _initializers(bare):
        tensor = value.const_value
        if tensor is not None and tensor.dtype != ir.DataType.STRING:
            digest.update(f"{value.name}:{tensor.dtype}:{tensor.shape}:".encode())
            if counts(tensor):
                digest.update(tensor.tobytes())
            value.const_value = None
    for graph in bare.graphs():
        for name in [name for name, value in graph.initializers.items() if value.const_value is None]:
            graph.initializers.pop(name)
    digest.update(_to_proto(bare).SerializeToString(deterministic=True))
    return digest.hexdigest()


def save(model: ir.Model, path: str | os.PathLike[str], *, overwrite: bool = False) -> tuple[Path, ...]:
    """Write a model atomically: temporary file, fsync, rename.

    Tensors go to `PATH.data` beside it where they do not fit one protobuf message.

    Returns:
        The files written.

    Raises:
        ModelError: the folder does not exist or is not writable, or the file exists and `overwrite` is off.
    """
    target = Path(path)
    files.check_target(target, overwrite=overwrite)
    if tensor_bytes(model) <= PROTOBUF_LIMIT:
        with files.replacing(target) as temporary:
            temporary.write_bytes(to_bytes(model))
        return (target,)
    data = target.with_name(target.name + ".data")
    files.check_target(data, overwrite=overwrite)
    # The data are renamed first: whoever finds a model at `target` finds its data too.
    with files.replacing(target) as temporary, files.replacing(data) as temporary_data:
        stored = model.clone()
        strings = {value: value.const_value for value in _initializers(stored) if value.dtype == ir.DataType.STRING}
        for value in strings:  # ONNX has no external strings
            value.const_value = None
        external_data.unload_from_model(stored, target.parent, temporary_data.name, size_threshold_bytes=1024)
        for value, text in strings.items():
            value.const_value = text
        proto = _to_proto(stored)
        for tensor in protos.all_tensors(proto):
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = data.name
        temporary.write_bytes(proto.SerializeToString(deterministic=True))
    return (target, data)


def save_as_given(source: ModelSource, model: ir.Model, path: str | os.PathLike[str], *, overwrite: bool) -> None:
    """Write a model to which nothing was done: the bytes that it came as, where it came as one file.

    Raises:
        ModelError: as `save`.
    """
    content = source if isinstance(source, bytes) else None
    if isinstance(source, str | os.PathLike):
        content = protos.read(Path(source))
    if content is None or list(protos.external_parts(protos.parse(content, str(path)), str(path))):
        save(model, path, overwrite=overwrite)
        return
    files.check_target(path, overwrite=overwrite)
    with files.replacing(Path(path)) as temporary:
        temporary.write_bytes(content)


def _innermost(error: BaseException) -> BaseException:
    """What went wrong at the bottom: onnx_ir wraps an error once per level of the graph."""
    return error if error.__cause__ is None else _innermost(error.__cause__)


def _to_proto(model: ir.Model) -> onnx.ModelProto:
    """The model as a message, without what onnx_ir adds to it.

    Tensors in attributes lose their names: those mean nothing, and passes rewrite them. onnx_ir writes a new name of a
    value into its tensor, which clones share: the same model would give other bytes. Types of initializers are not
    written a second time, which is a fiftieth of a quantized model.
    """
    proto = ir.to_proto(model)
    for tensor in protos.attribute_tensors(proto):
        tensor.ClearField("name")
    for graph in protos.all_graphs(proto):
        known = {tensor.name for tensor in graph.initializer}
        typed = [value for value in graph.value_info if value.name not in known]
        if len(typed) < len(graph.value_info):
            del graph.value_info[:]
            graph.value_info.extend(typed)
    return proto


def typed(model: ir.Model) -> set[str]:
    """Names of the values between nodes whose type is known."""
    return {value.name or "" for value in _between_nodes(model) if value.type is not None}


def forget_types(model: ir.Model, known: Set[str]) -> None:
    """Take the types from values between nodes, in place.

    Those stay that are known by name, and those that other domains' operators give: not everyone can infer them.
    """
    for value in _between_nodes(model):
        maker = value.producer()
        if value.name not in known and maker is not None and maker.domain == "":
            value.type = value.shape = None


def _between_nodes(model: ir.Model) -> Iterator[ir.Value]:
    for graph in model.graphs():
        for node in graph:
            yield from (value for value in node.outputs if not value.is_graph_output())


def _initializers(model: ir.Model) -> Iterator[ir.Value]:
    for graph in model.graphs():
        yield from graph.initializers.values()


def _in_memory(model: ir.Model) -> ir.Model:
    """The model with its external tensors read in, or itself where there are none."""
    if not any(isinstance(value.const_value, ir.ExternalTensor) for value in _initializers(model)):
        return model
    return external_data.load_to_model(model.clone())
