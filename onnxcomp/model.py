"""Models in, models out: load, check, fingerprint, and write atomically.

The model is an `onnx_ir.Model` throughout. Its tensors are shared between clones: replace them, never write into them.
"""

import contextlib
import glob
import hashlib
import math
import os
import tempfile
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from pathlib import Path

import google.protobuf.message
import numpy as np
import onnx
import onnx.external_data_helper
import onnx_ir as ir
from onnx_ir import external_data

from onnxcomp.errors import ModelError

ModelSource = str | os.PathLike[str] | bytes | onnx.ModelProto | ir.Model

PROTOBUF_LIMIT = 2**31 - 2**24
"""Bytes of tensors that still fit one protobuf message of 2 GiB, with room for the graph."""


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
        proto = _parse(source, name)
    else:
        path = Path(source)
        name, folder = str(path), path.resolve().parent
        proto = _parse(_read(path), name)
    _check_external(proto, folder, name)
    if folder is not None:
        _load_attributes(proto, folder)
    if _has_sparse(proto):
        proto = _densified(proto)
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
    files: list[Path] = []
    if isinstance(source, ir.Model):
        proto = _to_proto(source)
    elif isinstance(source, onnx.ModelProto):
        proto = source
    elif isinstance(source, bytes):
        proto = _parse(source, "the model")
    else:
        path = Path(source)
        proto, folder = _parse(_read(path), str(path)), path.resolve().parent
        _check_external(proto, folder, str(path))
        files = sorted({folder / location for location, _, _ in _external_parts(proto, str(path))})
    digest.update(proto.SerializeToString(deterministic=True))
    for file in files:
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
        proto = _parse(source, "the model") if isinstance(source, bytes) else _parse(_read(Path(source)), str(source))
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
    bare = model.clone()
    digest = hashlib.sha256()
    for value in _initializers(bare):
        if value.const_value is not None and value.const_value.dtype != ir.DataType.STRING:
            digest.update(f"{value.name}:{value.const_value.shape}:".encode())
            digest.update(value.const_value.tobytes())
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
    check_target(target, overwrite=overwrite)
    if tensor_bytes(model) <= PROTOBUF_LIMIT:
        with replacing(target) as temporary:
            temporary.write_bytes(to_bytes(model))
        return (target,)
    data = target.with_name(target.name + ".data")
    check_target(data, overwrite=overwrite)
    # The data are renamed first: whoever finds a model at `target` finds its data too.
    with replacing(target) as temporary, replacing(data) as temporary_data:
        stored = model.clone()
        strings = {value: value.const_value for value in _initializers(stored) if value.dtype == ir.DataType.STRING}
        for value in strings:  # ONNX has no external strings
            value.const_value = None
        external_data.unload_from_model(stored, target.parent, temporary_data.name, size_threshold_bytes=1024)
        for value, text in strings.items():
            value.const_value = text
        proto = _to_proto(stored)
        for tensor in _all_tensors(proto):
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
        content = _read(Path(source))
    if content is None or list(_external_parts(_parse(content, str(path)), str(path))):
        save(model, path, overwrite=overwrite)
        return
    check_target(path, overwrite=overwrite)
    with replacing(Path(path)) as temporary:
        temporary.write_bytes(content)


def check_target(
    path: str | os.PathLike[str], *, overwrite: bool, inputs: Sequence[object] = (), option: str = "-o"
) -> None:
    """Refuse a target that could not be written, before any work is done.

    Args:
        path: the target.
        overwrite: whether an existing file may be replaced.
        inputs: models and data that must stay: those that are paths, with a model's external data.
        option: what the user gives another target to.

    Raises:
        ModelError: as for `save`, or the target is one of `inputs`.
    """
    target = Path(path)
    folder = target.parent
    if not folder.is_dir():
        raise ModelError(f"the output folder '{folder}' does not exist", remedy=f"mkdir -p '{folder}'")
    if target.resolve() in _files_of(inputs) or any(_holds(source, target) for source in inputs):
        raise ModelError(f"'{target}' is an input itself", "inputs are never modified", f"give another {option}")
    if target.is_dir():
        raise ModelError(f"'{target}' is a folder", remedy=f"give a file name to {option}")
    if target.exists() and not target.is_file():
        raise ModelError(f"'{target}' is no regular file", "a device or a pipe", f"give a file name to {option}")
    if target.exists() and not overwrite:
        raise ModelError(f"'{target}' exists", remedy=f"add --overwrite, or give another name to {option}")
    if not os.access(folder, os.W_OK):
        raise ModelError(f"cannot write to '{folder}'", "the folder is read-only", f"give another {option}")


def _files_of(inputs: Sequence[object]) -> set[Path]:
    """The files that inputs are, and those in which models keep external data."""
    files: set[Path] = set()
    for path in (Path(source) for source in inputs if isinstance(source, str | os.PathLike)):
        files.add(path.resolve())
        if path.is_file() and path.suffix == ".onnx":
            with contextlib.suppress(ModelError):  # loading will say what is wrong with it
                parts = _external_parts(_parse(_read(path), str(path)), str(path))
                files |= {(path.resolve().parent / location).resolve() for location, _, _ in parts}
    return files


def _holds(source: object, target: Path) -> bool:
    """Whether the target is a file in a folder of data."""
    if not isinstance(source, str | os.PathLike) or not Path(source).is_dir():
        return False
    return target.exists() and target.resolve().is_relative_to(Path(source).resolve())


@contextlib.contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A temporary file beside `target` that takes its place at the end, or is removed on any error."""
    try:
        _remove_leftovers(target)
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.{os.getpid()}.", dir=target.parent)
    except OSError as error:
        raise ModelError(f"cannot write to '{target.parent}': {error.strerror}", remedy="give another -o") from error
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb+") as stream:
            os.fsync(stream.fileno())
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(target)
    except OSError as error:
        raise ModelError(f"cannot write '{target}': {error.strerror}", "the disk is full or read-only") from error
    finally:
        temporary.unlink(missing_ok=True)


def _remove_leftovers(target: Path) -> None:
    """Remove what processes that were killed on this machine left of their temporary files."""
    for path in target.parent.glob(f".{glob.escape(target.name)}.*.*"):
        process = path.name.removeprefix(f".{target.name}.").partition(".")[0]
        if process.isdecimal() and not _runs(int(process)):
            path.unlink(missing_ok=True)


def _runs(process: int) -> bool:
    """Whether there is such a process; elsewhere than on POSIX, where asking may end it, there is."""
    if os.name != "posix":
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # it is somebody else's
    return True


def write_text(text: str, path: str | os.PathLike[str]) -> None:
    """Write a report atomically; an existing file is replaced.

    Raises:
        ModelError: the folder does not exist or is not writable.
    """
    target = Path(path)
    if target.exists() and not target.is_file() and not target.is_dir():
        target.write_text(text, encoding="utf-8")  # a pipe or a device
        return
    check_target(target, overwrite=True)
    with replacing(target) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise ModelError(f"no such file: '{path}'", remedy="check the path") from error
    except IsADirectoryError as error:
        raise ModelError(f"'{path}' is a folder, not a model", remedy="give the .onnx file inside") from error
    except OSError as error:
        raise ModelError(f"cannot read '{path}': {error.strerror}") from error


def _parse(data: bytes, name: str) -> onnx.ModelProto:
    cause = "the file is truncated, or is not an ONNX model (a Git LFS pointer, a checkpoint)"
    try:
        proto: onnx.ModelProto = onnx.ModelProto.FromString(data)
    except google.protobuf.message.DecodeError as error:
        raise ModelError(f"{name} is not an ONNX model: it does not parse", cause, "export or copy it again") from error
    if not proto.HasField("graph") or not proto.ir_version or not proto.opset_import:
        raise ModelError(f"{name} is not an ONNX model: it has no graph", cause, "export or copy it again")
    return proto


def _innermost(error: BaseException) -> BaseException:
    """What went wrong at the bottom: onnx_ir wraps an error once per level of the graph."""
    return error if error.__cause__ is None else _innermost(error.__cause__)


def _all_graphs(proto: onnx.ModelProto) -> Iterator[onnx.GraphProto]:
    def below(nodes: Iterator[onnx.NodeProto]) -> Iterator[onnx.GraphProto]:
        for node in nodes:
            for attribute in node.attribute:
                graphs = [attribute.g] if attribute.HasField("g") else list(attribute.graphs)
                for graph in graphs:
                    yield graph
                    yield from below(iter(graph.node))

    yield proto.graph
    yield from below(iter(proto.graph.node))
    for function in proto.functions:
        yield from below(iter(function.node))


def _all_nodes(proto: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    for function in proto.functions:
        yield from function.node
    for graph in _all_graphs(proto):
        yield from graph.node


def _all_tensors(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    for graph in _all_graphs(proto):
        yield from graph.initializer
    yield from _attribute_tensors(proto)


def _attribute_tensors(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    for node in _all_nodes(proto):
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors


def _external_parts(proto: onnx.ModelProto, name: str) -> Iterator[tuple[str, int, int]]:
    """Location, offset and length of each tensor stored outside the file."""
    for tensor in _all_tensors(proto):
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        info = {entry.key: entry.value for entry in tensor.external_data}
        try:
            needed = math.ceil(math.prod(tensor.dims) * ir.DataType(tensor.data_type).itemsize)
            offset, length = int(info.get("offset", 0)), int(info.get("length", needed))
            valid = offset >= 0 and length >= needed
        except (ValueError, TypeError):  # a number that is none, a type without a size
            valid = False
        if not valid:
            raise ModelError(f"{name}: tensor '{tensor.name}' has no valid place in its external data", "a broken file")
        yield info.get("location", ""), offset, length


def external_locations(proto: onnx.ModelProto, name: str) -> list[str]:
    """The files in which a model keeps tensors, relative to its folder, each once."""
    return list(dict.fromkeys(location for location, _, _ in _external_parts(proto, name)))


def _check_external(proto: onnx.ModelProto, folder: Path | None, name: str) -> None:
    for location, offset, length in _external_parts(proto, name):
        if folder is None:
            raise ModelError(
                f"{name} keeps tensors in '{location}', but was not given as a path",
                "external data are found relative to the model's file",
                "pass the path, or onnx.load(path) with its external data",
            )
        file = (folder / location).resolve()
        if not location or Path(location).is_absolute() or not file.is_relative_to(folder):
            raise ModelError(
                f"{name} points to external data outside its folder: '{location}'",
                "a hand-made or hostile file",
                "keep the data beside the model",
            )
        if not file.is_file():
            raise ModelError(
                f"{name} needs its external data '{location}', which is missing",
                "the .onnx file was copied without its data file",
                f"copy '{location}' beside it",
            )
        if not os.access(file, os.R_OK):
            raise ModelError(
                f"{name} needs its external data '{location}', which may not be read", remedy=f"chmod +r '{file}'"
            )
        if file.stat().st_size < offset + length:
            raise ModelError(f"{name}: its external data '{location}' is truncated", remedy="copy it again")


def _load_attributes(proto: onnx.ModelProto, folder: Path) -> None:
    """Read in what node attributes keep outside the file: onnx_ir 1.1 finds external data of initializers only."""
    for node in _all_nodes(proto):
        for attribute in node.attribute:
            for tensor in [attribute.t, *attribute.tensors]:
                if tensor.data_location == onnx.TensorProto.EXTERNAL:
                    onnx.external_data_helper.load_external_data_for_tensor(tensor, str(folder))
                    tensor.data_location = onnx.TensorProto.DEFAULT
                    del tensor.external_data[:]


def _to_proto(model: ir.Model) -> onnx.ModelProto:
    """The model as a message, without what onnx_ir adds to it.

    Tensors in attributes lose their names: those mean nothing, and passes rewrite them. onnx_ir writes a new name of a
    value into its tensor, which clones share: the same model would give other bytes. Types of initializers are not
    written a second time, which is a fiftieth of a quantized model.
    """
    proto = ir.to_proto(model)
    for tensor in _attribute_tensors(proto):
        tensor.ClearField("name")
    for graph in _all_graphs(proto):
        known = {tensor.name for tensor in graph.initializer}
        typed = [value for value in graph.value_info if value.name not in known]
        if len(typed) < len(graph.value_info):
            del graph.value_info[:]
            graph.value_info.extend(typed)
    return proto


def _has_sparse(proto: onnx.ModelProto) -> bool:
    return any(graph.sparse_initializer for graph in _all_graphs(proto)) or any(
        attribute.HasField("sparse_tensor") for node in _all_nodes(proto) for attribute in node.attribute
    )


def _densified(proto: onnx.ModelProto) -> onnx.ModelProto:
    """A copy with dense tensors: onnx_ir 1.1 drops sparse initializers with only a log line, and refuses constants."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    for graph in _all_graphs(copy):
        graph.initializer.extend(_dense(sparse) for sparse in graph.sparse_initializer)
        del graph.sparse_initializer[:]
    for node in _all_nodes(copy):
        for attribute in node.attribute:
            if attribute.HasField("sparse_tensor"):
                attribute.CopyFrom(onnx.helper.make_attribute("value", _dense(attribute.sparse_tensor)))
    return copy


def _dense(sparse: onnx.SparseTensorProto) -> onnx.TensorProto:
    values, indices = onnx.numpy_helper.to_array(sparse.values), onnx.numpy_helper.to_array(sparse.indices)
    dense = np.zeros(tuple(sparse.dims), values.dtype)
    if indices.ndim == 1:
        dense.reshape(-1)[indices] = values
    else:
        dense[tuple(indices.T)] = values
    return onnx.numpy_helper.from_array(dense, sparse.values.name)


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
