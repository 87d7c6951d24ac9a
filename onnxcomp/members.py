"""The members of a group of channels: the layers that make them, the layers that read them, and what comes between."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from onnxcomp.channels import ChannelGroup, Slot
from onnxcomp.layers import Layer, layer_of


class Writer(NamedTuple):
    """A layer whose output channels are the group's.

    Attributes:
        layer: the layer.
        slot: where they lie in its weight.
    """

    layer: Layer
    slot: Slot


class Reader(NamedTuple):
    """A layer that multiplies the group's channels with weights of its own.

    Attributes:
        layer: the layer.
        columns: (size, n) the columns of its matrix that each channel meets; of one group of a grouped convolution, as
            they are the same in each.
    """

    layer: Layer
    columns: NDArray[np.int64]


def writers(group: ChannelGroup) -> list[Writer]:
    """The layers that make the channels. A grouped convolution that loses whole groups, as a depthwise one, is one."""
    return [
        Writer(layer, slot)
        for layer, slot in _weights(group)
        if slot.axis == layer.channel_axis or _takes_whole_groups(layer, slot)
    ]


def readers(group: ChannelGroup) -> list[Reader]:
    """The layers that read the channels and mix them."""
    found = []
    for layer, slot in _weights(group):
        if slot.axis != 1 - layer.channel_axis or _takes_whole_groups(layer, slot):
            continue
        taps = int(np.prod(layer.kernel)) if layer.node.op_type == "Conv" else 1
        positions = slot.positions
        if layer.node.op_type == "ConvTranspose":  # its axis runs over the inputs of all groups
            positions = positions[:, : positions.shape[1] // layer.groups]
        columns = positions[:, :, None] * taps + np.arange(taps)
        found.append(Reader(layer, columns.reshape(group.size, -1)))
    return found


def scales(group: ChannelGroup) -> list[Slot]:
    """Where the channels lie in the scales of BatchNormalization."""
    return [
        slot
        for slot in group.slots
        if slot.value.const_value is not None
        and any(use.node.op_type == "BatchNormalization" and use.idx == 1 for use in slot.value.uses())
    ]


def input_slot(group: ChannelGroup, layer: Layer) -> Slot | None:
    """Where the channels lie in what a reader takes; None where the rank of that is unknown."""
    shape = layer.data.shape
    if shape is None:
        return None
    axis = layer.input_axis % len(shape)
    return next((slot for slot in group.slots if slot.value is layer.data and slot.axis == axis), None)


def constants_of(slot: Slot) -> NDArray[np.float64]:
    """All elements of a constant that belong to each channel, (size, n), in float64."""
    tensor = slot.value.const_value
    assert tensor is not None
    rows = np.moveaxis(tensor.numpy().astype(np.float64), slot.axis, 0)
    return rows[slot.positions].reshape(len(slot.positions), -1)


def _weights(group: ChannelGroup) -> Iterator[tuple[Layer, Slot]]:
    for slot in group.slots:
        for use in slot.value.uses() if slot.value.const_value is not None else ():
            layer = layer_of(use.node)
            if layer is not None and layer.index == use.idx:
                yield layer, slot


def _takes_whole_groups(layer: Layer, slot: Slot) -> bool:
    """Whether a channel is whole groups of a transposed convolution, input and output, rather than a share of each."""
    if layer.node.op_type != "ConvTranspose" or layer.groups == 1 or slot.axis != 0:
        return False
    width = layer.weight_shape[0] // layer.groups
    return bool(len(np.unique(slot.positions[0] // width)) * width == slot.positions.shape[1])
