"""What was done, why, and what it brought: values that the console, JSON and Python read."""

import math
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

import onnx_ir as ir

from onnxcomp import __version__, runtime
from onnxcomp.budget import Budget
from onnxcomp.core import Change, Outcome, Pass, Skip, Width
from onnxcomp.machine import machine
from onnxcomp.runtime import Target, Timing

SCHEMA_VERSION = 1

Interval = tuple[float, float]


class Document:
    """Something that a command prints or writes as JSON, after `docs/report.schema.json`."""

    kind: ClassVar[str]

    def to_json(self) -> dict[str, Any]:
        """The same as plain values. JSON has no infinity: it is the string `Infinity`, as `float` reads it."""
        return {"schema": SCHEMA_VERSION, "kind": self.kind, **_plain(asdict(self))}  # type: ignore[call-overload]


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


# --- one model made into another ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Figures:
    """A model's figures, each measured.

    Attributes:
        size: bytes of the file, external data included.
        latency: median seconds per run.
        latency_interval: 2.5% and 97.5% quantiles over blocks.
        speedup: original's latency over this one's, median over rounds measured side by side.
        score: value of the metric, or None where it was not measured.
        score_interval: 95% interval of the metric.
        drop: loss against the original, in the metric's unit; positive is worse.
        memory: bytes by which a fresh process grew that loaded and ran it, or None where there is no limit on that.
        speedup_interval: quartiles of the speed-up over rounds.
        drop_interval: 95% interval of the drop, on the same samples.
    """

    size: int
    latency: float | None = None
    latency_interval: Interval | None = None
    speedup: float | None = None
    score: float | None = None
    score_interval: Interval | None = None
    drop: float | None = None
    memory: int | None = None
    speedup_interval: Interval | None = None
    drop_interval: Interval | None = None


@dataclass(frozen=True)
class Trial:
    """One candidate that the search looked at.

    Attributes:
        name: what it is.
        figures: on the data that judge.
        verdict: what became of it, and why.
        predicted: the speed-up that was foretold, where it was planned.
    """

    name: str
    figures: Figures
    verdict: str
    predicted: float | None = None


@dataclass(frozen=True)
class Step:
    """One pass of the recipe, and what it did.

    Attributes:
        recipe: the pass with all its settings, as Python writes it.
        changes: what was done to which node.
        skips: what was left, and why.
        widths: groups of channels that it could prune, with the saliency of each channel.
    """

    recipe: str
    changes: tuple[Change, ...] = ()
    skips: tuple[Skip, ...] = ()
    widths: tuple[Width, ...] = ()

    @classmethod
    def of(cls, technique: Pass, outcome: Outcome) -> Self:
        """A pass and what came of it."""
        return cls(repr(technique), outcome.changes, outcome.skips, outcome.widths)


@dataclass(frozen=True)
class Histogram:
    """How many values lie in each of several bins of equal width between two ends."""

    low: float
    high: float
    counts: tuple[int, ...]


@dataclass(frozen=True)
class LayerRow:
    """A layer before and after: a node, with the element-wise nodes behind it that work on nothing but its output.

    What is unknown is None: the time of what ONNX Runtime fused into a neighbour, and all of a layer that is gone.

    Attributes:
        name, op: of the node; what was not in the original stands with its own name, and what ONNX Runtime put in by
            itself, its conversions of layout and some fused operators, without a name in the last row.
        microseconds, microseconds_after: in the profiles of both models, run in turn.
        bytes, bytes_after: of the weights as stored; what several layers read is shared out by their parameters.
        techniques: what was done to it, in order, each with the name of the pass.
        sensitivity: relative squared error of its output in the result, with that of all layers before it.
        weights, weights_after: of the node's weight and of what it multiplies with in the result, in the same bins.
    """

    name: str
    op: str
    microseconds: float | None = None
    microseconds_after: float | None = None
    bytes: int | None = None
    bytes_after: int | None = None
    techniques: tuple[str, ...] = ()
    sensitivity: float | None = None
    weights: Histogram | None = None
    weights_after: Histogram | None = None


@dataclass(frozen=True)
class Report(Document):
    """The proof that goes with an optimized model.

    Attributes:
        source, output: where the model came from and went to.
        fingerprint: SHA-256 of the input.
        environment: versions, machine, execution provider, threads, batch.
        protocol: how latency was measured.
        metric: name of the metric; empty without data.
        data: what was measured on which samples, and whether judge and final are the same.
        budget: what was asked for.
        met: whether the result keeps it.
        unmet: which limits it breaks, in words.
        original, result: the two models' figures.
        steps: what each pass of the recipe did.
        trials: what else was tried.
        notes: what the user should know.
        command: the command line that asks for the same again; empty where there is none.
        layers: each layer before and after; empty where no page was asked for.
        recipe: as YAML, for `apply --recipe`; empty where nothing was done.
    """

    kind: ClassVar[str] = "report"

    source: str
    output: str | None
    fingerprint: str
    environment: Mapping[str, str | int]
    protocol: str
    metric: str
    data: str
    budget: Budget
    met: bool
    unmet: tuple[str, ...]
    original: Figures
    result: Figures
    steps: tuple[Step, ...]
    trials: tuple[Trial, ...] = ()
    notes: tuple[str, ...] = field(default_factory=tuple)
    command: str = ""
    layers: tuple[LayerRow, ...] = ()
    recipe: str = ""


@dataclass(frozen=True)
class Result:
    """A model that was made from another, and its proof.

    Attributes:
        model: the result.
        report: the proof.
        family: what else is worth a choice, where it was asked for.
    """

    model: ir.Model
    report: Report
    family: Document | None = None


def environment(target: Target, batch: int, seed: int = 0) -> dict[str, str | int]:
    """What figures depend on beside the models.

    Raises:
        ProviderError: the target's provider is not available.
    """
    return {
        "onnxcomp": __version__,
        "onnxruntime": runtime.VERSION,
        "provider": target.providers[0],
        "threads": target.threads,
        "batch": batch,
        "machine": machine(),
        "python": platform.python_version(),
        "seed": seed,
    }


def source_name(source: object) -> str:
    """What to call a model: its path, or the type of what was given."""
    return str(source) if isinstance(source, str | Path) else type(source).__name__


# --- several models side by side ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spread:
    """A figure over several processes."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Speed:
    """One model of a benchmark.

    Attributes:
        source: the model.
        size: bytes of the file, external data included.
        latency: seconds per run, and the ratio to the first model.
        throughput: rows per second.
        load: seconds that a fresh process takes to load it.
        memory: bytes by which a fresh process grows while it loads and runs it; None where the system does not say.
    """

    source: str
    size: int
    latency: Timing
    throughput: float
    load: Spread
    memory: Spread | None


@dataclass(frozen=True)
class Benchmark(Document):
    """Models timed side by side.

    Attributes:
        models: in the order given; ratios are to the first.
        environment: as in a report.
        protocol: how latency was measured.
        data: where the inputs came from.
        processes: over how many fresh processes load time and memory were measured.
        notes: what the user should know.
    """

    kind: ClassVar[str] = "benchmark"

    models: tuple[Speed, ...]
    environment: Mapping[str, str | int]
    protocol: str
    data: str
    processes: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Quality:
    """One model of an evaluation; what is measured against the first model is None for the first itself.

    Attributes:
        source: the model.
        score, score_interval: of the metric.
        drop, drop_interval: against the first model, on the same samples; positive is worse.
        relative_error: ||y - y'|| / ||y|| of the worst output.
        agreement: share of samples with the same highest class; None where no output looks like class scores.
    """

    source: str
    score: float
    score_interval: Interval | None
    drop: float | None = None
    drop_interval: Interval | None = None
    relative_error: float | None = None
    agreement: float | None = None


@dataclass(frozen=True)
class Evaluation(Document):
    """Models scored on the same samples.

    Attributes:
        models: in the order given; fidelity is to the first.
        environment: as in a report.
        metric: its name.
        data: the samples, and why this metric.
        notes: what the user should know.
    """

    kind: ClassVar[str] = "evaluation"

    models: tuple[Quality, ...]
    environment: Mapping[str, str | int]
    metric: str
    data: str
    notes: tuple[str, ...] = ()


# --- one model, layer by layer --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NodeRow:
    """One node.

    Attributes:
        name, op: of the node; the operator with its domain where it is not a standard one.
        shape: of the first output; None where even the rank is unknown.
        parameters: elements of its weights.
        bytes: of its weights as stored.
        flops: None where unknown.
        microseconds: median of its time in a profile; None where it was fused into a neighbour or not timed.
        note: why something is unknown or was assumed.
    """

    name: str
    op: str
    shape: tuple[int, ...] | None
    parameters: int
    bytes: int
    flops: int | None
    microseconds: float | None
    note: str


@dataclass(frozen=True)
class GroupRow:
    """Coupled channels: any may go, if it goes everywhere.

    Attributes:
        name: of the first layer that makes them, numbered where that makes several kinds (heads and their dimensions).
        size: how many channels.
        width: places that each takes along the axis on which the first layer makes them.
        made_by: layers whose output channels they are.
        read_by: layers that multiply them with weights of their own.
        tensors: how many tensors hold them, weights and activations.
        crossing: normalisations and reductions over them: without a channel the others get other values.
    """

    name: str
    size: int
    width: int
    made_by: tuple[str, ...]
    read_by: tuple[str, ...]
    tensors: int
    crossing: tuple[str, ...]


@dataclass(frozen=True)
class FrozenRow:
    """A layer whose output channels cannot go, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class WeightRow:
    """What a layer's weights bear.

    Attributes:
        name: of the layer.
        shape: of its weight.
        outputs: rows of its matrix, the most that its rank can be.
        rank_90, rank_99: the rank that keeps so many percent of its output's energy; 0 where it has none to tell.
        spectrum: share of the energy kept at 1/16, 2/16, ... of the full rank.
        errors: relative squared error of its output with a codebook of 1, 2, ... 8 bits, by k-means alone.
        bits: the fewest at which that is no more than 1%; 0 where 8 are too few.
    """

    name: str
    shape: tuple[int, ...]
    outputs: int
    rank_90: int
    rank_99: int
    spectrum: tuple[float, ...]
    errors: tuple[float, ...]
    bits: int


@dataclass(frozen=True)
class OptionRow:
    """One way to treat one part of a model, and what that would cost.

    Attributes:
        technique: name of the pass.
        part: layer or group of channels.
        setting: how far it goes: bits, a share, a form.
        error: relative squared error of what the part gives.
        bytes: of its weights then.
        latency: of the part by itself, relative to what it takes now.
    """

    technique: str
    part: str
    setting: int | float | str
    error: float
    bytes: int
    latency: float


@dataclass(frozen=True)
class LatencyRow:
    """What a kind of chain of nodes takes.

    Attributes:
        operators: of its nodes, in order.
        input, weight: shapes of what comes in and of the largest constant of its first node; None where there is none.
        count: how many of them the model has.
        first: name of the first one.
        microseconds: that each takes, by precision; 0 where ONNX Runtime fused it into a neighbour.
    """

    operators: str
    input: tuple[int, ...] | None
    weight: tuple[int, ...] | None
    count: int
    first: str
    microseconds: Mapping[str, float]


@dataclass(frozen=True)
class WidthRow:
    """What is left of the time of the chains that read or write a kind of group, with fewer channels.

    Attributes:
        group: name of the first such group.
        size: channels that it has.
        width: channels that are left.
        count: how many such groups the model has.
        shares: of the time, by precision.
    """

    group: str
    size: int
    width: int
    count: int
    shares: Mapping[str, float]


@dataclass(frozen=True)
class CrossingRow:
    """What it takes to bring a tensor into integers, or out of them, with the change of layout that comes with it.

    Attributes:
        elements: of the tensor.
        quantize, dequantize: microseconds.
    """

    elements: int
    quantize: float
    dequantize: float


@dataclass(frozen=True)
class LatencyTable:
    """What the parts of a model take on a target.

    Attributes:
        chains: kinds of chains of nodes.
        widths: kinds of groups of channels, with fewer of them.
        crossings: between float and integers; empty where there are no integers.
        layouts: microseconds of what ONNX Runtime puts in by itself to change layouts, by precision.
    """

    chains: tuple[LatencyRow, ...]
    widths: tuple[WidthRow, ...]
    crossings: tuple[CrossingRow, ...]
    layouts: Mapping[str, float]


@dataclass(frozen=True)
class Inspection(Document):
    """A model's nodes and their sums.

    Attributes:
        source: the model.
        opset: version of the standard operator set.
        inputs, outputs: name, type and shape in words.
        size: bytes of the file, external data included.
        parameters, bytes, flops: sums, with shared tensors counted once.
        nodes: in the graph's order.
        environment: as in a report.
        protocol: how times were measured; empty where they were not.
        notes: what the user should know.
        groups: coupled channels; empty where not asked for.
        frozen: layers whose channels are in no group; empty where not asked for.
        weights: what each layer's weights bear; empty where not asked for.
        options: what passes could do to each part; empty where not asked for.
        latency: the latency table; None where not asked for.
    """

    kind: ClassVar[str] = "inspection"

    source: str
    opset: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    size: int
    parameters: int
    bytes: int
    flops: int
    nodes: tuple[NodeRow, ...]
    environment: Mapping[str, str | int]
    protocol: str
    notes: tuple[str, ...] = ()
    groups: tuple[GroupRow, ...] = ()
    frozen: tuple[FrozenRow, ...] = ()
    weights: tuple[WeightRow, ...] = ()
    options: tuple[OptionRow, ...] = ()
    latency: LatencyTable | None = None
