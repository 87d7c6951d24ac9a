"""ONNX messages: read and checked before `onnx_ir` sees them, with what it leaves out."""

import math
import os
from collections.abc import Iterator
from pathlib import Path

import google.protobuf.message
import numpy as np
import onnx
import onnx.external_data_helper
import onnx_ir as ir

from onnxcomp.errors import ModelError


def read(path: Path) -> bytes:
    """The bytes of a model's file.

    Raises:
        ModelError: there is none, or it may not be read.
    """
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise ModelError(f"no such file: '{path}'", remedy="check the path") from error
    except IsADirectoryError as error:
        raise ModelError(f"'{path}' is a folder, not a model", remedy="give the .onnx file inside") from error
    except OSError as error:
        raise ModelError(f"cannot read '{path}': {error.strerror}") from error


def parse(data: bytes, name: str) -> onnx.ModelProto:
    """The message in a model's bytes.

    Raises:
        ModelError: they are no model.
    """
    cause = "the file is truncated, or is not an ONNX model (a Git LFS pointer, a checkpoint)"
    try:
        proto: onnx.ModelProto = onnx.ModelProto.FromString(data)
    except google.protobuf.message.DecodeError as error:
        raise ModelError(f"{name} is not an ONNX model: it does not parse", cause, "export or copy it again") from error
    if not proto.HasField("graph") or not proto.ir_version or not proto.opset_import:
        raise ModelError(f"{name} is not an ONNX model: it has no graph", cause, "export or copy it again")
    return proto


def all_graphs(proto: onnx.ModelProto) -> Iterator[onnx.GraphProto]:
    """The graph, and those of control flow in it and in functions."""

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
    for graph in all_graphs(proto):
        yield from graph.node


def all_tensors(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Initializers, and tensors in attributes."""
    for graph in all_graphs(proto):
        yield from graph.initializer
    yield from attribute_tensors(proto)


def attribute_tensors(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Tensors in attributes of nodes, functions included."""
    for node in _all_nodes(proto):
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors


def external_parts(proto: onnx.ModelProto, name: str) -> Iterator[tuple[str, int, int]]:
    """Location, offset and length of each tensor stored outside the file."""
    for tensor in all_tensors(proto):
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
    return list(dict.fromkeys(location for location, _, _ in external_parts(proto, name)))


def check_external(proto: onnx.ModelProto, folder: Path | None, name: str) -> None:
    """Refuse external data that cannot be read, or lie outside the model's folder.

    Raises:
        ModelError: naming the file.
    """
    for location, offset, length in external_parts(proto, name):
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


def load_attributes(proto: onnx.ModelProto, folder: Path) -> None:
    """Read in what node attributes keep outside the file: onnx_ir 1.1 finds external data of initializers only."""
    for node in _all_nodes(proto):
        for attribute in node.attribute:
            for tensor in [attribute.t, *attribute.tensors]:
                if tensor.data_location == onnx.TensorProto.EXTERNAL:
                    onnx.external_data_helper.load_external_data_for_tensor(tensor, str(folder))
                    tensor.data_location = onnx.TensorProto.DEFAULT
                    del tensor.external_data[:]


def has_sparse(proto: onnx.ModelProto) -> bool:
    """Whether any tensor is stored as its nonzero elements."""
    return any(graph.sparse_initializer for graph in all_graphs(proto)) or any(
        attribute.HasField("sparse_tensor") for node in _all_nodes(proto) for attribute in node.attribute
    )


def densified(proto: onnx.ModelProto) -> onnx.ModelProto:
    """A copy with dense tensors: onnx_ir 1.1 drops sparse initializers with only a log line, and refuses constants."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    for graph in all_graphs(copy):
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
