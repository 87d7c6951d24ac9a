"""A search without clocks and chance: latencies, losses and sensitivities are functions of the model.

    lab.loss = lambda model: 0.3 if "g2" in integers(model) else 0.0
    report = lab.optimize(budget=Budget(max_drop=0.1)).report

Everything else is real: passes, sessions, data, files.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from onnxcomp import candidates, drafts, metrics, optimizer, placement, search, stopwatch
from onnxcomp.candidates import Effort
from onnxcomp.judges import Judges
from onnxcomp.metrics import Score
from onnxcomp.placement import Crossing
from onnxcomp.profiling import Profile
from onnxcomp.report import Result, Trial
from onnxcomp.runtime import Protocol, Session, Target, Timing

WIDTH = 32
LAYERS = ("g0", "g1", "g2", "g3", "g4", "g5")
FINAL = 31
"""Final samples of the 121 that the lab gives; 30 judge."""


def network(layers: Sequence[str] = LAYERS, seed: int = 0) -> ir.Model:
    """A chain of layers with Relu between them; batch open."""
    random = np.random.default_rng(seed)
    value = x = ir.val("x", dtype=ir.DataType.FLOAT, shape=ir.Shape(["n", WIDTH]))
    nodes, constants = [], []
    for name in layers:
        array = (random.standard_normal((WIDTH, WIDTH)) * np.sqrt(2 / WIDTH)).astype(np.float32)
        weight = ir.val(f"{name}_w", const_value=ir.tensor(array, name=f"{name}_w"))
        constants.append(weight)
        nodes.append(ir.node("MatMul", [value, weight], name=name))
        if name != layers[-1]:
            nodes.append(ir.node("Relu", nodes[-1].outputs, name=f"{name}_relu"))
        value = nodes[-1].outputs[0]
    for node in nodes:
        node.outputs[0].name = f"{node.name}_y"
        node.outputs[0].dtype, node.outputs[0].shape = ir.DataType.FLOAT, ir.Shape(["n", WIDTH])
    return ir.Model(ir.Graph([x], [value], nodes=nodes, initializers=constants, opset_imports={"": 17}), ir_version=8)


def wasteful() -> ir.Model:
    """The network, and a layer that nobody reads, for clean-up to gain by."""
    model = network()
    weight = ir.val("unread_w", const_value=ir.tensor(np.ones((WIDTH, WIDTH), np.float32), name="unread_w"))
    model.graph.register_initializer(weight)
    model.graph.append(ir.node("MatMul", [model.graph.inputs[0], weight], name="unread"))
    model.graph[-1].outputs[0].name = "unread_y"
    return model


def samples(count: int = 121, labels: bool = False) -> dict[str, NDArray[Any]]:
    """Inputs of the network."""
    x = np.random.default_rng(1).standard_normal((count, WIDTH)).astype(np.float32)
    return {"x": x} | ({"label": np.arange(count) % WIDTH} if labels else {})


def integers(model: ir.Model) -> set[str]:
    """The layers that multiply in static INT8."""
    found = set()
    for node in model.graph:
        sources = [value.producer() for value in node.inputs if value is not None]
        if node.op_type == "MatMul" and all(s is not None and s.op_type == "DequantizeLinear" for s in sources):
            found.add(node.name or "")
    return found


def operators(model: ir.Model) -> set[str]:
    """Types of all nodes."""
    return {node.op_type for node in model.graph}


def faster_with_every_layer(model: ir.Model) -> float:
    """A latency: each layer in static INT8 saves a tenth."""
    return 1.0 - 0.1 * len(integers(model))


@dataclass
class Lab:
    """Attributes: functions of a model, seconds and loss; what the loss on final data is if not the same; the order
    of sensitivity."""

    latency: Callable[[ir.Model], float] = faster_with_every_layer
    loss: Callable[[ir.Model], float] = lambda model: 0.0
    final_loss: Callable[[ir.Model], float] | None = None
    order: Callable[[str], float] = lambda name: 0.0
    protocols: list[Protocol] = field(default_factory=list)
    timed: list[int] = field(default_factory=list)  # models, each time
    scored: int = 0

    def optimize(self, source: Any = None, **options: Any) -> Result:
        """With 121 samples, quickly, unless told otherwise."""
        given: dict[str, Any] = {"calib": samples(), "effort": Effort.QUICK, "target": Target(threads=1)} | options
        return optimizer.optimize(network() if source is None else source, **given)

    def time_apart(self, models: Sequence[ir.Model], target: Any, feeds: Any, protocol: Protocol) -> list[Timing]:
        self.protocols.append(protocol)
        self.timed.append(len(models))
        times = [self.latency(model) for model in models]
        ratios = [times[0] / time for time in times]
        return [Timing(time, time, time, ratio, ratio, ratio) for time, ratio in zip(times, ratios, strict=True)]

    def evaluate(self, metric: metrics.Metric, predict: Any, data: Any, reference: Any, rows: int) -> Score:
        self.scored += 1
        final = len(data) == FINAL and self.final_loss is not None
        loss = (self.final_loss if final and self.final_loss else self.loss)(_model(predict.__self__))
        return Score(metric, metric.best - loss if metric.higher_is_better else metric.best + loss, None)

    def ranking(self, original: Any, candidate: Any, nodes: Collection[str], *_: Any) -> list[str]:
        return sorted(nodes, key=lambda name: (-self.order(name), name))


def _model(session: Session) -> ir.Model:
    model: ir.Model = session.model  # type: ignore[attr-defined]
    return model


@pytest.fixture
def lab(monkeypatch: pytest.MonkeyPatch) -> Lab:
    made = Lab()
    start = Session.__init__

    def remember(self: Session, model: Any, *args: Any, **options: Any) -> None:
        start(self, model, *args, **options)
        self.model = model  # type: ignore[attr-defined]

    def all_in_integers(pair: Sequence[ir.Model], *_: Any) -> list[Profile]:
        names = [node.name or "" for node in pair[0].graph]
        return [Profile(dict.fromkeys(names, time), {}) for time in (10.0, 1.0)]

    monkeypatch.setattr(Session, "__init__", remember)
    monkeypatch.setattr(Judges, "_beside", None)  # losses are what the lab says, and nothing else tells them
    monkeypatch.setattr(stopwatch, "time_apart", made.time_apart)
    monkeypatch.setattr(metrics, "evaluate", made.evaluate)
    monkeypatch.setattr(search, "ranking", made.ranking)
    monkeypatch.setattr(drafts, "profiles", all_in_integers)
    monkeypatch.setattr(placement, "measure_crossing", lambda *_: Crossing((1,), (0.0,), (0.0,)))
    for module in (candidates, optimizer):
        monkeypatch.setattr(module, "paced", lambda protocol, *_: protocol)
    return made


def trial(result: Result, name: str) -> Trial:
    """The only trial of that name."""
    (found,) = [trial for trial in result.report.trials if trial.name == name]
    return found
