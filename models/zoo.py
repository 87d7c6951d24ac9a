"""Every builder by name, and inputs to feed what it builds.

    model = build("resnet")
    session.run(None, feeds(model))

Weights are random and seeded: the same name gives the same bytes. Nothing here was trained; use it for what must hold
for any weights, and `models/digits.onnx` or `models/letters.onnx` for accuracy.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from models import convnets, oddities, pixels, signals, transformers

BUILDERS: dict[str, Callable[[], ir.Model]] = {
    builder.__name__: builder
    for builder in (
        convnets.resnet,
        convnets.preact_resnet,
        convnets.mobilenetv2,
        convnets.shufflenet,
        convnets.densenet,
        convnets.inception,
        convnets.vgg,
        convnets.senet,
        convnets.convnext,
        pixels.unet,
        pixels.detector,
        pixels.superres,
        transformers.vit,
        transformers.bert,
        transformers.gpt,
        transformers.mixer,
        signals.lstm_tagger,
        signals.gru_tagger,
        signals.conv1d,
        signals.conv3d,
        oddities.control_flow,
        oddities.functions,
        oddities.custom_domain,
        oddities.shared_weights,
        oddities.weights_as_inputs,
        oddities.fp16_weights,
        oddities.string_lookup,
        oddities.quantized_already,
    )
}
"""Small models (below 2 MB, milliseconds to run), one per family of architecture or oddity of the format."""

PROTO_BUILDERS: dict[str, Callable[[], onnx.ModelProto]] = {"sparse_initializer": oddities.sparse_initializer}
"""Small models that an `onnx_ir.Model` cannot hold."""

LARGE: dict[str, Callable[[], ir.Model]] = {
    builder.__name__: builder for builder in (convnets.imagenet_resnet50, convnets.imagenet_mobilenetv2)
}
"""ImageNet sizes, for timing."""

UNRUNNABLE = {"custom_domain": "its operator has no kernel in ONNX Runtime"}
"""Builders whose models no session loads, and why."""

AXES = {"length": 12, "samples": 400, "height": 24, "width": 20}


def build(name: str) -> onnx.ModelProto:
    """The model of that name, from whichever of the three tables has it."""
    if name in PROTO_BUILDERS:
        return PROTO_BUILDERS[name]()
    return ir.to_proto((BUILDERS | LARGE)[name]())


def feeds(model: onnx.ModelProto, batch: int = 2, seed: int = 0) -> dict[str, npt.NDArray[Any]]:
    """Random inputs for one of the models: normal floats, valid ids, masks that end in padding, known strings."""
    random = np.random.default_rng(seed)
    defaults = {tensor.name for tensor in model.graph.initializer}

    def values(info: onnx.ValueInfoProto) -> npt.NDArray[Any]:
        tensor = info.type.tensor_type
        axes = AXES | {"batch": batch}
        shape = [dim.dim_value or axes[dim.dim_param] for dim in tensor.shape.dim]
        if info.name == "attention_mask":
            return (np.arange(shape[1]) < random.integers(1, shape[1] + 1, (shape[0], 1))).astype(np.int64)
        match tensor.elem_type:
            case onnx.TensorProto.INT64:
                return random.integers(0, 2 if info.name == "token_type_ids" else 100, shape)
            case onnx.TensorProto.STRING:
                return random.choice([*oddities.COLOURS, "unknown"], shape).astype(object)
            case _:
                return random.normal(size=shape).astype(np.float32)

    return {info.name: values(info) for info in model.graph.input if info.name not in defaults}
