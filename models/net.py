"""The tool that the zoo's builders are written with: one graph, seeded weights, a method per kind of layer."""

import copy
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

FLOAT, INT64 = ir.DataType.FLOAT, ir.DataType.INT64


class Net:
    """A graph under construction, written for one opset.

    Methods append nodes and return the value computed. Images are [batch, channels, height, width] and sequences
    [batch, length, features]. Weights follow He et al. 2015 (variance 2 / fan-in), so that signals keep their size at
    any depth; they depend on the seed and the order of calls alone.
    """

    def __init__(self, opset: int, seed: int = 0) -> None:
        self.opset = opset
        self.random = np.random.default_rng(seed)
        self.graph = ir.Graph([], [], nodes=[], opset_imports={"": opset}, name="main")
        self.functions: list[ir.Function] = []
        self._numbers = itertools.count()

    def branch(self, name: str) -> "Net":
        """A net for the body of an If, Loop or function: it shares this one's values, names and randomness."""
        inner = copy.copy(self)
        inner.graph = ir.Graph([], [], nodes=[], opset_imports={"": self.opset}, name=name)
        return inner

    def model(self, ir_version: int | None = None) -> ir.Model:
        """The finished model, by default with the oldest IR version that has the opset."""
        opsets = [onnx.helper.make_opsetid("", self.opset)]
        version = ir_version or onnx.helper.find_min_ir_version_for(opsets)
        return ir.Model(self.graph, ir_version=version, functions=self.functions)

    # Values

    def input(self, name: str, shape: Sequence[int | str], dtype: ir.DataType = FLOAT) -> ir.Value:
        """A graph input; strings in the shape are dynamic axes."""
        value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))
        self.graph.inputs.append(value)
        return value

    def output(self, name: str, value: ir.Value, shape: Sequence[int | str], dtype: ir.DataType = FLOAT) -> None:
        """Makes the value a graph output of this name and shape."""
        value.name, value.shape, value.type = name, ir.Shape(shape), ir.TensorType(dtype)
        self.graph.outputs.append(value)

    def weight(self, array: npt.NDArray[Any] | ir.StringTensor, name: str = "weight") -> ir.Value:
        """An initializer."""
        tensor = ir.tensor(array)
        tensor.name = f"{name}_{next(self._numbers)}"
        value = ir.Value(
            name=tensor.name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
        )
        self.graph.register_initializer(value)
        return value

    def constant(self, values: Any, dtype: npt.DTypeLike = np.int64) -> ir.Value:
        """A Constant node, where exporters put shapes, axes and scalars."""
        return self.op("Constant", value=ir.tensor(np.asarray(values, dtype)))

    def normal(self, *shape: int, fan_in: int) -> npt.NDArray[np.float32]:
        """Normal values of variance 2 / fan_in."""
        return self.random.normal(0, np.sqrt(2 / fan_in), shape).astype(np.float32)

    def uniform(self, low: float, high: float, *shape: int) -> npt.NDArray[np.float32]:
        """Uniform values in low..high."""
        return self.random.uniform(low, high, shape).astype(np.float32)

    # Operators

    def op(self, op_type: str, *inputs: ir.Value | None, domain: str = "", **attributes: Any) -> ir.Value:
        """Any operator, its first output only."""
        return self.ops(1, op_type, *inputs, domain=domain, **attributes)[0]

    def ops(
        self, outputs: int, op_type: str, *inputs: ir.Value | None, domain: str = "", **attributes: Any
    ) -> Sequence[ir.Value]:
        """Any operator with several outputs."""
        name = f"{op_type}_{next(self._numbers)}"
        node = ir.node(op_type, inputs, attributes, domain=domain, num_outputs=outputs, name=name)
        for index, value in enumerate(node.outputs):
            value.name = f"{name}_out{index}"
        self.graph.append(node)
        return node.outputs

    def relu(self, x: ir.Value) -> ir.Value:
        """Rectifier."""
        return self.op("Relu", x)

    def relu6(self, x: ir.Value) -> ir.Value:
        """Clip to 0..6; the bounds are inputs since opset 11."""
        if self.opset < 11:
            return self.op("Clip", x, min=0.0, max=6.0)
        return self.op("Clip", x, self.constant(0, np.float32), self.constant(6, np.float32))

    def gelu(self, x: ir.Value) -> ir.Value:
        """x/2 * (1 + erf(x / sqrt 2)), spelt out as exporters did before opset 20."""
        erf = self.op("Erf", self.op("Div", x, self.constant(np.sqrt(2), np.float32)))
        gate = self.op("Mul", x, self.op("Add", erf, self.constant(1, np.float32)))
        return self.op("Mul", gate, self.constant(0.5, np.float32))

    def reshape(self, x: ir.Value, *shape: int) -> ir.Value:
        """Reshape with 0 for "as it is" and -1 for "the rest"."""
        return self.op("Reshape", x, self.constant(shape))

    def unsqueeze(self, x: ir.Value, *axes: int) -> ir.Value:
        """New axes of length one; the axes are an input since opset 13."""
        if self.opset < 13:
            return self.op("Unsqueeze", x, axes=axes)
        return self.op("Unsqueeze", x, self.constant(axes))

    def mean(self, x: ir.Value, *axes: int, keepdims: bool = True) -> ir.Value:
        """Mean over axes; they are an input since opset 18."""
        if self.opset < 18:
            return self.op("ReduceMean", x, axes=axes, keepdims=int(keepdims))
        return self.op("ReduceMean", x, self.constant(axes), keepdims=int(keepdims))

    def size_of(self, x: ir.Value, axis: int) -> ir.Value:
        """The length of an axis at run time, as int64 [1]."""
        return self.op("Slice", self.op("Shape", x), self.constant([axis]), self.constant([axis + 1]))

    def upsample(self, x: ir.Value, factor: int, mode: str) -> ir.Value:
        """Resize height and width by a factor (opset 11 or later)."""
        region = None if self.opset >= 13 else self.constant([], np.float32)
        return self.op("Resize", x, region, self.constant([1, 1, factor, factor], np.float32), mode=mode)

    # Layers

    def conv(
        self,
        x: ir.Value,
        inputs: int,
        outputs: int,
        kernel: int = 3,
        stride: int = 1,
        group: int = 1,
        bias: bool = True,
        rank: int = 2,
    ) -> ir.Value:
        """Convolution over `rank` spatial axes, padded so that stride 1 keeps the size."""
        fan_in = inputs // group * kernel**rank
        parameters = [
            self.weight(self.normal(outputs, inputs // group, *[kernel] * rank, fan_in=fan_in), "conv.weight")
        ]
        if bias:
            parameters.append(self.weight(self.uniform(-0.1, 0.1, outputs), "conv.bias"))
        return self.op(
            "Conv", x, *parameters,
            kernel_shape=[kernel] * rank, strides=[stride] * rank, pads=[kernel // 2] * 2 * rank, group=group,
        )  # fmt: skip

    def batch_norm(self, x: ir.Value, channels: int, gain: float = 1.0) -> ir.Value:
        """BatchNormalization whose scales lie around `gain`."""
        scale, variance = self.uniform(0.8, 1.2, channels) * np.float32(gain), self.uniform(0.8, 1.2, channels)
        shift, mean = self.uniform(-0.2, 0.2, channels), self.uniform(-0.2, 0.2, channels)
        names = ("bn.weight", "bn.bias", "bn.running_mean", "bn.running_var")
        arrays = (scale, shift, mean, variance)
        return self.op("BatchNormalization", x, *map(self.weight, arrays, names), epsilon=1e-5)

    def conv_norm(
        self,
        x: ir.Value,
        inputs: int,
        outputs: int,
        kernel: int = 3,
        stride: int = 1,
        group: int = 1,
        gain: float = 1.0,
    ) -> ir.Value:
        """Convolution without bias, then BatchNorm: not folded, as training leaves them."""
        return self.batch_norm(self.conv(x, inputs, outputs, kernel, stride, group, bias=False), outputs, gain)

    def layer_norm(self, x: ir.Value, features: int) -> ir.Value:
        """LayerNormalization over the last axis, spelt out before opset 17."""
        scale = self.weight(self.uniform(0.8, 1.2, features), "norm.weight")
        shift = self.weight(self.uniform(-0.1, 0.1, features), "norm.bias")
        if self.opset >= 17:
            return self.op("LayerNormalization", x, scale, shift, axis=-1, epsilon=1e-5)
        centred = self.op("Sub", x, self.mean(x, -1))
        variance = self.mean(self.op("Pow", centred, self.constant(2, np.float32)), -1)
        deviation = self.op("Sqrt", self.op("Add", variance, self.constant(1e-5, np.float32)))
        return self.op("Add", self.op("Mul", self.op("Div", centred, deviation), scale), shift)

    def linear(self, x: ir.Value, inputs: int, outputs: int) -> ir.Value:
        """MatMul and Add on the last axis."""
        product = self.op("MatMul", x, self.weight(self.normal(inputs, outputs, fan_in=inputs), "linear.weight"))
        return self.op("Add", product, self.weight(self.uniform(-0.1, 0.1, outputs), "linear.bias"))

    def gemm(self, x: ir.Value, inputs: int, outputs: int) -> ir.Value:
        """Gemm on [batch, inputs], its weight stored as [outputs, inputs]."""
        weight = self.weight(self.normal(outputs, inputs, fan_in=inputs), "gemm.weight")
        return self.op("Gemm", x, weight, self.weight(self.uniform(-0.1, 0.1, outputs), "gemm.bias"), transB=1)

    def classify(self, x: ir.Value, channels: int, classes: int = 10) -> None:
        """The usual end: global average, Flatten, Gemm, output `logits`."""
        pooled = self.op("Flatten", self.op("GlobalAveragePool", x), axis=1)
        self.output("logits", self.gemm(pooled, channels, classes), ["batch", classes])
