"""Half precision: float32 becomes float16 or bfloat16 inside the graph; inputs and outputs keep their types.

A node is converted if the operator's schema allows the type for its inputs, and the target has a kernel for it. What
stays float32, each with its reason:

1. Where activations exceed the type on calibration data: the producer and the readers of the tensor.
2. Where a constant loses more than 1% in rounding, by overflow or underflow: its readers.
3. What becomes an integer, back to the last layer: above 2,048 float16 does not hold every integer.
4. Neighbours of QuantizeLinear and DequantizeLinear, whose kernels want the float32 that they were made for.
5. Control flow, sequences, and operators outside the standard.
6. On the CPU, products that read a Transpose which moves the batch axis inward: ONNX Runtime 1.31 fuses them into a
   kernel that it lacks for float16, and crashes.
7. Islands without a layer: they would only pay for the Casts around them.

Saturating constants before a Softmax (masks of -3e38) are cut first, to half of what the type can hold, so that scores
can still be added. Large constants of a node that only lacks a kernel are stored in the smaller type, and ONNX Runtime
casts them when it loads the model.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx.defs
import onnx_ir as ir
from numpy.typing import NDArray

from onnxcomp.calibration import calibrate
from onnxcomp.core import Change, Choice, Context, Outcome, Pass, Skip, name_nodes
from onnxcomp.errors import ModelError, OnnxcompError
from onnxcomp.graph import Builder, constant_of, prepared, remove_unused
from onnxcomp.model import opset
from onnxcomp.observations import Observed
from onnxcomp.runtime import Session, Target

_OPSET = 13
_FLOAT = ir.DataType.FLOAT
_LARGE = 1024
_LOSS = 0.01
_TO_SOFTMAX = {
    *("Add", "Sub", "Mul", "Div", "Neg", "Where", "Cast", "Clip", "Min", "Max", "Concat", "Expand"),
    *("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Gather", "Tile", "Identity"),
}
_ANY_TYPE = {"Cast", "Shape", "Size"}  # take whatever comes, and give what they gave before
_QUANTIZING = {"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"}


class Float(Choice):
    """The smaller float type."""

    FP16 = "fp16"
    BF16 = "bf16"

    @property
    def dtype(self) -> ir.DataType:
        """As ONNX names it."""
        return ir.DataType.FLOAT16 if self is Float.FP16 else ir.DataType.BFLOAT16

    @property
    def largest(self) -> float:
        """The largest finite value."""
        return 65504.0 if self is Float.FP16 else 3.3895e38

    def rounded(self, array: NDArray[np.floating]) -> NDArray[Any]:
        """The array in this type; too large values become infinite."""
        with np.errstate(over="ignore"):
            return array.astype(self.dtype.numpy())

    def holds(self, array: NDArray[np.floating]) -> bool:
        """Whether rounding changes the array by at most 1% in the Euclidean norm; infinities do not count."""
        exact = array[np.isfinite(array)].astype(np.float64)
        change = self.rounded(exact).astype(np.float64) - exact
        return bool(np.linalg.norm(change) <= _LOSS * np.linalg.norm(exact))


@dataclass(frozen=True)
class ConvertFloat(Pass):
    """Half precision.

    Attributes:
        to: the type.
        keep: names of the nodes that stay float32.
    """

    name: ClassVar[str] = "convert-float"
    summary: ClassVar[str] = "half precision: float16 or bfloat16 inside, checked for overflow on data"

    to: Float = Float.FP16
    keep: tuple[str, ...] = ()

    def apply(self, model: ir.Model, context: Context) -> Outcome:
        """Convert all that can be."""
        converted = prepared(model, _OPSET)
        if isinstance(converted, str):
            return Outcome(model, (), (Skip("model", converted),))
        name_nodes(converted)
        original = converted.clone()
        _cut_masks(converted, self.to)
        plans = _Planner(converted, self, context).plans()
        changes = _Surgery(converted, self.to, plans).run()
        remove_unused(converted)
        if changes and (failure := _failure(original, converted, context)) is not None:
            return Outcome(model, (), (Skip("model", failure),))
        skips = tuple(Skip(node.name or "", plan.reason) for node, plan in plans.items() if plan.reason)
        return Outcome(converted if changes else model, changes, skips)


@dataclass
class _Plan:
    """Which inputs and outputs of a node become half; none where there is a reason against it."""

    inputs: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()
    reason: str = ""
    stores: bool = False
    """Whether its large constants are stored as half all the same."""


def _cut_masks(model: ir.Model, to: Float) -> None:
    """Cut constants that a Softmax saturates on to half of the type's range."""
    for graph in model.graphs():
        for value in list(graph.initializers.values()):
            array = _constant(value)
            if array is None:
                continue
            if np.isfinite(array).all() and np.abs(array).max(initial=0) > to.largest / 2 and _reaches_softmax(value):
                value.const_value = ir.tensor(np.clip(array, -to.largest / 2, to.largest / 2), name=value.name)


def _reaches_softmax(value: ir.Value) -> bool:
    front, seen = deque([value]), {value}
    while front:
        for use in front.popleft().uses():
            if use.node.op_type in {"Softmax", "LogSoftmax"}:
                return True
            if use.node.op_type in _TO_SOFTMAX:
                front.extend(output for output in use.node.outputs if output not in seen)
                seen.update(use.node.outputs)
    return False


class _Planner:
    """Decides for each node."""

    def __init__(self, model: ir.Model, settings: ConvertFloat, context: Context) -> None:
        self._model, self._settings, self._context = model, settings, context
        self._nodes = list(model.graph.all_nodes())
        self._kernels: dict[tuple[object, ...], bool] = {}

    def plans(self) -> dict[ir.Node, _Plan]:
        """The plan of each node that handles float32 tensors."""
        plans = self._without_data({})
        values = [value for node, plan in plans.items() if not plan.reason for value in _values(node)]
        beyond = self._beyond(values) if values else {}
        return self._without_data(beyond) if beyond else plans

    def _without_data(self, beyond: Mapping[ir.Value, float]) -> dict[ir.Node, _Plan]:
        exact, plans = self._exact(), {}
        for node in self._nodes:
            if not any(_is_float(value) for value in _values(node)) or node.op_type in _ANY_TYPE:
                continue
            plan = self._slots(node)
            if obstacle := self._obstacle(node, exact, beyond):
                plan = _Plan(reason=plan.reason or obstacle)
            elif not plan.reason and not self._has_kernel(node, plan):
                provider = self._context.target.short
                plan = _Plan(reason=f"{provider} has no {self._settings.to} kernel for {node.op_type}", stores=True)
            plans[node] = plan
        self._drop_islands(plans)
        return plans

    def _slots(self, node: ir.Node) -> _Plan:
        """The inputs and outputs whose type may change, by the operator's schema."""
        if node.domain not in {"", "ai.onnx"} or node.op_type in _QUANTIZING:
            return _Plan(reason=f"{node.op_type} takes float32 as it is")
        if any(attribute.type == ir.AttributeType.GRAPH for attribute in node.attributes.values()):
            return _Plan(reason="values enter and leave control flow as float32")
        if any(value.dtype is None or not isinstance(value.type, ir.TensorType) for value in _values(node)):
            return _Plan(reason="the types of its inputs or outputs are not known, or no tensors")
        schema = onnx.defs.get_schema(node.op_type, opset(self._model), "")
        wanted = f"tensor({self._settings.to.dtype.name.lower()})"
        free = {c.type_param_str for c in schema.type_constraints if wanted in c.allowed_type_strs}
        inputs = {
            index: kind
            for index, value in enumerate(node.inputs)
            if value is not None and _is_float(value) and (kind := _kind(schema.inputs, index)) in free
        }
        # What no input determines, an attribute does.
        outputs = [
            index
            for index, value in enumerate(node.outputs)
            if _is_float(value) and _kind(schema.outputs, index) in set(inputs.values())
        ]
        reason = "" if inputs else f"the standard has no {node.op_type} in {self._settings.to}"
        return _Plan(tuple(inputs), tuple(outputs), reason, stores=bool(reason))

    def _obstacle(self, node: ir.Node, exact: set[ir.Node], beyond: Mapping[ir.Value, float]) -> str:
        if self._context.excludes(node):
            return "excluded by the user"
        if node.name in self._settings.keep:
            return "kept in float32"
        if node in exact:
            return "its result becomes an integer"
        for value in _values(node):
            if value in beyond:
                return f"'{value.name}' reaches {beyond[value]:.3g} on the calibration data"
            if (array := _constant(value)) is not None and not self._settings.to.holds(array):
                return f"'{value.name}' does not survive rounding to {self._settings.to}"
        neighbours = [value.producer() for value in node.inputs if value is not None]
        neighbours += [use.node for value in node.outputs for use in value.uses()]
        if any(other is not None and other.op_type in _QUANTIZING for other in neighbours):
            return "stands beside quantized operators"
        products = [node, *(use.node for value in node.outputs for use in value.uses())]
        if self._context.target.short == "cpu" and any(map(_crosses_batch, products)):
            return "ONNX Runtime crashes on the product behind a Transpose of the batch axis"
        return ""

    def _beyond(self, values: Iterable[ir.Value]) -> dict[ir.Value, float]:
        """Those of the main graph that exceed the type on the data, and by what. Infinities count for nothing."""
        if self._context.data is None:
            return {}
        main = [value for value in dict.fromkeys(values) if value.graph is self._model.graph]
        observed = [Observed(value) for value in main if _is_float(value) and _constant(value) is None]
        statistics = calibrate(self._model, self._context.data, self._context, observed, finite=False).tensors
        histograms = {seen.value: statistics[seen.value.name or ""].histogram for seen in observed}
        peaks = {value: max(-seen.minimum, seen.maximum) for value, seen in histograms.items()}
        return {value: peak for value, peak in peaks.items() if peak > self._settings.to.largest}

    def _exact(self) -> set[ir.Node]:
        """The nodes between a layer and a Cast to integers."""
        found: set[ir.Node] = set()
        front = deque(node for node in self._nodes if node.op_type == "Cast" and _gives_integers(node))
        while front:
            for value in front.popleft().inputs:
                producer = None if value is None or not _is_float(value) else value.producer()
                if producer is not None and producer not in found and not _is_layer(producer):
                    found.add(producer)
                    front.append(producer)
        return found

    def _has_kernel(self, node: ir.Node, plan: _Plan) -> bool:
        """Whether ONNX Runtime loads the node alone, with the types it would have."""
        half = self._settings.to.dtype
        dtypes = [
            None if value is None else half if index in plan.inputs else value.dtype
            for index, value in enumerate(node.inputs)
        ]
        key = (node.op_type, len(node.outputs), *dtypes, *sorted(map(str, node.attributes.values())))
        if key not in self._kernels:
            inputs = [
                None if dtype is None else ir.Value(name=f"input_{index}", type=ir.TensorType(dtype))
                for index, dtype in enumerate(dtypes)
            ]
            alone = ir.node(node.op_type, inputs, num_outputs=len(node.outputs))
            alone.attributes.update(node.attributes)
            for index, (twin, value) in enumerate(zip(alone.outputs, node.outputs, strict=True)):
                dtype = half if index in plan.outputs else value.dtype
                twin.name = f"output_{index}" if value.name else ""
                twin.type = None if dtype is None else ir.TensorType(dtype)
            given = [value for value in inputs if value is not None]
            outputs = [value for value in alone.outputs if value.name]
            graph = ir.Graph(given, outputs, nodes=[alone], opset_imports={"": opset(self._model)}, name="probe")
            self._kernels[key] = _loads(ir.Model(graph, ir_version=self._model.ir_version), self._context.target)
        return self._kernels[key]

    def _drop_islands(self, plans: dict[ir.Node, _Plan]) -> None:
        """Take back connected sets of converted nodes without a layer among them."""
        left = [node for node, plan in plans.items() if not plan.reason]
        seen: set[ir.Node] = set()
        for start in left:
            if start in seen:
                continue
            island, front = [], deque([start])
            seen.add(start)
            while front:
                node = front.popleft()
                island.append(node)
                for other in _linked(node, plans[node]):
                    if other in plans and not plans[other].reason and other not in seen:
                        seen.add(other)
                        front.append(other)
            if not any(_is_layer(node) for node in island):
                for node in island:
                    plans[node].reason = "between float32 operators, with no layer beside it"


class _Surgery:
    """Changes types as planned and puts Casts where they meet."""

    def __init__(self, model: ir.Model, to: Float, plans: dict[ir.Node, _Plan]) -> None:
        self._model, self._to, self._plans = model, to, plans
        self._floats = {value for graph in model.graphs() for value in _all_values(graph) if _is_float(value)}
        self._casts: dict[tuple[ir.Value, ir.DataType, ir.Graph], ir.Value] = {}
        self._builders: dict[ir.Graph, Builder] = {}

    def run(self) -> tuple[Change, ...]:
        """Edit the graph and its bodies."""
        changes = []
        for node in list(self._model.graph.all_nodes()):
            if node.op_type in _ANY_TYPE:
                continue
            plan = self._plans.get(node, _Plan())
            planned = bool(plan.inputs) and not plan.reason
            stored = False
            for index, value in enumerate(node.inputs):
                if value is None or value not in self._floats:
                    continue
                if planned and index in plan.inputs:
                    source = self._cast(value, self._to.dtype, node)
                elif plan.stores and (array := _constant(value)) is not None and array.size >= _LARGE:
                    source, stored = self._cast(self._cast(value, self._to.dtype, node), _FLOAT, node), True
                else:
                    source = self._cast(value, _FLOAT, node)
                node.replace_input_with(index, source)
            for index in plan.outputs if planned else ():
                node.outputs[index].type = ir.TensorType(self._to.dtype)  # a new one: clones share the old
            if planned or stored:
                changes.append(Change(node.name or "", f"{self._to}" if planned else f"{self._to} weights"))
        for graph in self._model.graphs():
            for index, output in enumerate(graph.outputs):
                if output in self._floats and output.dtype != _FLOAT:
                    self._restore(graph, index)
            for value in list(graph.initializers.values()):
                if not value.uses() and not value.is_graph_output() and not value.is_graph_input():
                    del graph.initializers[value.name or ""]
        return tuple(changes)

    def _cast(self, value: ir.Value, dtype: ir.DataType, reader: ir.Node) -> ir.Value:
        """The value in a type, by a new constant, a Cast of its own, or what an earlier Cast started from."""
        if value.dtype == dtype:
            return value
        producer = value.producer()
        if producer is not None and producer.op_type == "Cast" and producer.inputs[0] is not None:
            value = producer.inputs[0]
            if value.dtype == dtype:
                return value
        graph = value.graph if value.graph is not None else reader.graph
        assert isinstance(graph, ir.Graph)
        key = (value, dtype, graph)
        if key not in self._casts:
            builder, name = self._builder(graph), f"{value.name}_{dtype.name.lower()}"
            array = _constant(value)
            if array is not None and value.dtype == _FLOAT:
                self._casts[key] = builder.constant(self._to.rounded(array), name)
            else:
                producer = value.producer()
                before = graph[0] if producer is None else None
                self._casts[key] = builder.node(
                    "Cast", [value], name, like=value, dtype=dtype, after=producer, before=before, to=dtype
                )
        return self._casts[key]

    def _restore(self, graph: ir.Graph, index: int) -> None:
        """Give an output of a graph its type back, under its own name."""
        inner = graph.outputs[index]
        builder, name, producer = self._builder(graph), inner.name or "", inner.producer()
        inner.name = builder.name(f"{name}_{self._to.dtype.name.lower()}")
        outer = builder.node("Cast", [inner], name, like=inner, dtype=_FLOAT, after=producer, to=_FLOAT)
        outer.name = name
        graph.outputs[index] = outer

    def _builder(self, graph: ir.Graph) -> Builder:
        if graph not in self._builders:
            self._builders[graph] = Builder(graph)
        return self._builders[graph]


def _is_float(value: ir.Value) -> bool:
    return isinstance(value.type, ir.TensorType) and value.dtype == _FLOAT


def _failure(before: ir.Model, after: ir.Model, context: Context) -> str | None:
    """Why the target does not run the result, though it runs the original; some kernels find out as late as that."""
    try:
        session, original = Session(after, context.target), Session(before, context.target)
    except ModelError as error:
        return error.fact
    for feeds in context.examples(before, 1):
        try:
            original.run(feeds)
        except OnnxcompError:
            continue
        try:
            session.run(feeds)
        except OnnxcompError as error:
            return error.fact
    return None


def _loads(model: ir.Model, target: Target) -> bool:
    try:
        Session(model, target)
    except ModelError:
        return False
    return True


def _kind(parameters: Iterable[Any], index: int) -> str:
    """The type, or type variable, of an operator's formal parameter; the last one may be variadic."""
    formal = list(parameters)
    return str(formal[min(index, len(formal) - 1)].type_str)


def _values(node: ir.Node) -> Iterator[ir.Value]:
    yield from (value for value in node.inputs if value is not None)
    yield from (value for value in node.outputs if value.name)


def _all_values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph:
        yield from node.outputs


def _constant(value: ir.Value) -> NDArray[Any] | None:
    """The elements of a float32 constant."""
    return constant_of(value) if _is_float(value) else None


def _is_layer(node: ir.Node) -> bool:
    """Whether the node reads weights, maybe through a Cast."""
    for value in node.inputs:
        producer = None if value is None else value.producer()
        source = producer.inputs[0] if producer is not None and producer.op_type == "Cast" else value
        if value is None or not _is_float(value) or source is None or source.is_graph_input():
            continue
        if source.const_value is not None and source.const_value.size >= _LARGE:
            return True
    return False


def _gives_integers(cast: ir.Node) -> bool:
    return ir.DataType(cast.attributes.get_int("to", 0)).is_integer()


def _crosses_batch(node: ir.Node) -> bool:
    """Whether it is a product behind a Transpose that moves axis 0 to one of the last two places, all else in order."""
    producers = [value.producer() for value in node.inputs if value is not None] if node.op_type == "MatMul" else []
    for producer in producers:
        if producer is not None and producer.op_type == "Transpose":
            axes = list(producer.attributes.get_ints("perm", []))
            if len(axes) > 2 and 0 in axes[-2:] and [axis for axis in axes if axis] == sorted(axes)[1:]:
                return True
    return False


def _linked(node: ir.Node, plan: _Plan) -> Iterator[ir.Node]:
    """The producers and readers of what is converted."""
    for index in plan.inputs:
        value = node.inputs[index]
        producer = None if value is None else value.producer()
        if producer is not None:
            yield producer
    for index in plan.outputs:
        yield from (use.node for use in node.outputs[index].uses())
