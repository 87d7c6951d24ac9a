"""A residual network small enough that a test of a technique takes a second."""

import functools
from typing import Any

import numpy as np
import onnx_ir as ir

from models.net import Net
from onnxcomp import model as models
from onnxcomp.core import Context
from onnxcomp.passes.simplify import Simplify
from onnxcomp.runtime import Session, Target
from onnxcomp.synthetic import synthetic


@functools.cache
def network() -> ir.Model:
    """Convolutions of 24 and 32 channels on images of 8x8, and a linear layer."""
    net = Net(opset=13)
    x = net.input("image", ["batch", 3, 8, 8])
    x = net.relu(net.conv(x, 3, 24))
    for inputs, outputs, stride in [(24, 24, 1), (24, 32, 2)]:
        branch = net.relu(net.conv(x, inputs, outputs, stride=stride))
        branch = net.conv(branch, outputs, outputs)
        shortcut = x if stride == 1 else net.conv(x, inputs, outputs, 1, stride)
        x = net.relu(net.op("Add", branch, shortcut))
    net.classify(x, 32)
    return Simplify()(models.load(net.model())).model


def context(count: int = 64, target: Target = Target(threads=1), **settings: Any) -> Context:
    """Images to learn from."""
    return Context(synthetic(models.input_specs(network()), count, 0), target, **settings)


def error(original: ir.Model, made: ir.Model) -> float:
    """Relative squared error of the first output on made-up inputs that nothing was learnt from."""
    data = synthetic(models.input_specs(original), 8, 1, models.vocabularies(original))
    feeds = next(iter(data.batches(8))).feeds
    sessions = [Session(model, Target(threads=1)) for model in (original, made)]
    answers: list[Any] = [next(iter(session.run(feeds).values())) for session in sessions]
    return float(np.square(answers[0] - answers[1]).sum() / np.square(answers[0]).sum())
