"""Structured pruning: whole channels go, with all that belongs to them, and what is left makes up for them.

1. Coupled channels are found (`channels`), and the layers that read each group.
2. Group OBS on the Gram matrices of those layers gives, from one sweep, the error at every width of the group.
3. Errors are scaled by what they do to the model's outputs, measured once for each group.
4. Widths: the least error for the cost that is to remain (`widths`).
5. Surgery, least squares on the survivors, and every layer fitted again on the inputs that the pruned model gives it.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from onnxcomp.calibration import Gram, calibrate
from onnxcomp.channels import ChannelGroup, ChannelGroups, channel_groups
from onnxcomp.core import Change, Context, Outcome, Pass, Skip
from onnxcomp.errors import OnnxcompError, OptionError
from onnxcomp.graph import remove_unused
from onnxcomp.layers import Layer, layer_of
from onnxcomp.model import free_inputs, input_specs, spec_of, vocabularies
from onnxcomp.numerics.obs import Consumer, eliminate, survivors
from onnxcomp.reconstruction import Pair, ordered, reconstruct, set_bias, set_matrix
from onnxcomp.runtime import Session
from onnxcomp.samples import Dataset, Feeds
from onnxcomp.surgery import SurgeryError, without
from onnxcomp.synthetic import synthetic
from onnxcomp.widths import Cost, CostModel, Curve, allocate

_MADE_UP = 64
_PROBED = 64
"""Samples on which it is measured what a group's error does to the outputs."""

_DAMPING = 1e-2


@dataclass(frozen=True)
class Prune(Pass):
    """Structured pruning to a share of a cost.

    Attributes:
        remains: share of the cost that is to remain.
        cost: which cost.
        reconstruct: fit every layer again after the channels are gone.
        multiple: widths are multiples of this in groups of as many channels.
        least: share of its channels that every group keeps.

    Raises:
        OptionError: a share is not in (0, 1], or the multiple below 1.
    """

    name: ClassVar[str] = "prune"
    summary: ClassVar[str] = "structured pruning: coupled channels go physically, the others are fitted again"

    remains: float = 0.7
    cost: Cost = Cost.FLOPS
    reconstruct: bool = True
    multiple: int = 1
    least: float = 0.1

    def __post_init__(self) -> None:
        if not (0 < self.remains <= 1 and 0 <= self.least <= 1 and self.multiple >= 1):
            raise OptionError(
                f"a target of {self.remains:.4g}, a least share of {self.least:.4g} or widths in steps of "
                f"{self.multiple} make no sense",
                remedy="give shares between 0 and 1, and steps of 1 or more",
            )

    def apply(self, model: ir.Model, context: Context) -> Outcome:
        """Trace, choose, cut, fit."""
        if any(spec_of(value) is None for value in free_inputs(model)):
            return Outcome(model, (), (Skip("model", "an input is no tensor, so that shapes cannot be observed"),))
        data = context.data or synthetic(input_specs(model), _MADE_UP, context.seed, vocabularies(model))
        try:
            groups = channel_groups(model, next(iter(data.batches(1))).feeds)
        except OnnxcompError as error:
            return Outcome(model, (), (Skip("model", f"its channels cannot be traced: {error.fact}"),))
        skips = [Skip(frozen.name, frozen.reason) for frozen in groups.frozen]
        work = _Work(groups, data, context, self)
        skips += work.skips
        removed = work.choose()
        if not removed:
            return Outcome(model, (), tuple(skips))
        pruned = work.cut(removed)
        if self.reconstruct:
            work.fit_again(pruned)
        remove_unused(pruned)  # the weights as they were before
        note = "" if context.data is not None else ", fitted on made-up inputs"
        changes = [
            Change(group.name.partition("#")[0], f"{group.size - len(gone)} of {group.size} channels left{note}")
            for group, gone in removed.items()
        ]
        return Outcome(pruned, tuple(changes), tuple(skips))


class _Work:
    """One pruning of one model."""

    def __init__(self, groups: ChannelGroups, data: Dataset, context: Context, settings: Prune) -> None:
        self._groups, self._data, self._context, self._settings = groups, data, context, settings
        self._answers: list[tuple[Feeds, Feeds]] = []
        self._rows: dict[str, NDArray[np.bool_]] = {}
        self.skips: list[Skip] = []
        self._readers: dict[ChannelGroup, list[tuple[Layer, NDArray[np.int64]]]] = {}
        for group in groups:
            readers = _readers(group)
            if any(context.excludes(node) for node in _nodes(group)):
                self.skips.append(Skip(group.name, "excluded by the user"))
            elif not readers:
                self.skips.append(Skip(group.name, "no layer reads its channels with weights of its own"))
            elif any(node.graph is not groups.model.graph for node in _nodes(group)):
                self.skips.append(Skip(group.name, "a body of control flow reads or makes its channels"))
            elif any(_is_scaled(layer.node) for layer, _ in readers):
                self.skips.append(Skip(group.name, "a Gemm with alpha or beta reads its channels"))
            elif any(layer.groups > 1 for layer, _ in readers):
                self.skips.append(Skip(group.name, "a grouped convolution reads its channels"))
            else:
                self._readers[group] = readers
        self._layers = {layer.name: layer for readers in self._readers.values() for layer, _ in readers}
        self._grams: Mapping[str, Gram] = {}
        if self._layers:
            statistics = calibrate(groups.model, data, context, layers=list(self._layers.values()))
            self._grams = statistics.grams

    def choose(self) -> dict[ChannelGroup, NDArray[np.int64]]:
        """Which channels go."""
        settings = self._settings
        curves: list[Curve | None] = []
        for group in self._groups:
            curves.append(self._curve(group) if group in self._readers else None)
        cost = CostModel(self._groups, settings.cost)
        counts = allocate(cost, curves, settings.remains, multiple=settings.multiple)
        return {
            group: curve.order[:count]
            for group, curve, count in zip(self._groups, curves, counts, strict=True)
            if curve is not None and count
        }

    def _curve(self, group: ChannelGroup) -> Curve | None:
        consumers = []
        for layer, columns in self._readers[group]:
            consumers.append(Consumer(layer.matrix().astype(np.float64), self._moment(layer), columns))
        found = eliminate(consumers, _DAMPING)
        most = min(group.size - 1, int(group.size * (1 - self._settings.least)))
        half = max(1, most // 2)
        try:
            effect = self._effect(group, found.order[:half])
        except SurgeryError as error:
            self.skips.append(Skip(group.name, error.fact))
            return None
        scale = effect / max(found.errors[half], 1e-12)
        return Curve(found.order, found.errors * scale, most)

    def _effect(self, group: ChannelGroup, gone: NDArray[np.int64]) -> float:
        """Relative squared error of the model's outputs without some channels of one group."""
        samples = self._data.select(range(min(_PROBED, len(self._data))))
        session = Session(self.cut({group: gone}), self._context.target)
        signal = noise = 0.0
        for feeds, expected in self._expected(samples):
            for name, actual in session.run(feeds).items():
                if expected[name].dtype.kind == "f":
                    want = expected[name].astype(np.float64)
                    signal += float(np.square(want).sum())
                    noise += float(np.square(want - actual.astype(np.float64)).sum())
        return noise / signal if signal and np.isfinite(noise) else 1.0

    def _expected(self, samples: Dataset) -> list[tuple[Feeds, Feeds]]:
        """What the original answers, run once."""
        if not self._answers:
            session = Session(self._groups.model, self._context.target)
            self._answers = [(batch.feeds, session.run(batch.feeds)) for batch in samples.batches(16)]
        return self._answers

    def cut(self, removed: Mapping[ChannelGroup, NDArray[np.int64]]) -> ir.Model:
        """The model without channels, with least squares on what is left of each layer that read them."""
        pruned = without(self._groups, {group: gone.tolist() for group, gone in removed.items()})
        gone_columns: dict[str, list[NDArray[np.int64]]] = defaultdict(list)
        for group, gone in removed.items():
            for layer, columns in self._readers[group]:
                gone_columns[layer.name].append(columns[gone].ravel())
        twins = {node.name: node for node in pruned.graph.all_nodes()}
        self._rows = _kept_outputs(self._groups, removed)
        for name, parts in gone_columns.items():
            layer, twin = self._layers[name], layer_of(twins[name])
            assert twin is not None
            kept = np.ones(layer.input_width, bool)
            kept[np.concatenate(parts)] = False
            matrix, gram = layer.matrix().astype(np.float64), self._grams[name]
            fitted = survivors(matrix, self._moment(layer), kept, _DAMPING)
            rows = self._rows.get(name, np.ones(len(layer.by_output()), bool))
            if layer.node.op_type != "MatMul" and layer.node.op_type != "ConvTranspose":
                mean = gram.mean[0]
                shift = matrix @ mean - fitted @ mean[kept]
                set_bias(twin, (shift + layer.bias_vector())[rows])
            set_matrix(twin, fitted[_matrix_rows(layer, rows)])
        return pruned

    def _moment(self, layer: Layer) -> NDArray[np.float64]:
        """H of a layer's inputs; centred where its bias takes up their mean."""
        gram = self._grams[layer.name]
        H: NDArray[np.float64] = gram.second_moment[0]
        mean = gram.mean[0]
        return H if layer.node.op_type in {"MatMul", "ConvTranspose"} else H - np.outer(mean, mean)

    def fit_again(self, pruned: ir.Model) -> None:
        """Every layer of the pruned model, in order."""
        befores = {layer.name: layer for layer in ordered(self._groups.model)}
        pairs = []
        for after in ordered(pruned):
            before = befores[after.name]
            shared = len(before.weight.uses()) > 1
            if shared or after.node.op_type == "ConvTranspose" or self._context.excludes(after.node):
                continue
            rows = self._rows.get(after.name, np.ones(len(before.by_output()), bool))
            pairs.append(Pair(before, after, rows))
        reconstruct(self._groups.model, pruned, pairs, self._data, self._context)


def _readers(group: ChannelGroup) -> list[tuple[Layer, NDArray[np.int64]]]:
    """The layers that multiply the group's channels, and which columns of their matrix each channel meets."""
    found = []
    for slot in group.slots:
        for use in slot.value.uses() if slot.value.const_value is not None else ():
            layer = layer_of(use.node)
            if layer is None or layer.index != use.idx or slot.axis != 1 - layer.channel_axis:
                continue
            taps = int(np.prod(layer.kernel)) if layer.node.op_type == "Conv" else 1
            columns = slot.positions[:, :, None] * taps + np.arange(taps)
            found.append((layer, columns.reshape(group.size, -1)))
    return found


def _is_scaled(node: ir.Node) -> bool:
    return node.op_type == "Gemm" and {node.attributes.get_float(name, 1.0) for name in ("alpha", "beta")} != {1.0}


def _nodes(group: ChannelGroup) -> list[ir.Node]:
    """The nodes whose weights would change."""
    return [use.node for slot in group.slots if slot.value.const_value is not None for use in slot.value.uses()]


def _kept_outputs(
    groups: ChannelGroups, removed: Mapping[ChannelGroup, NDArray[np.int64]]
) -> dict[str, NDArray[np.bool_]]:
    """Which output channels of each layer are left, by its name."""
    result: dict[str, NDArray[np.bool_]] = {}
    for group, gone in removed.items():
        for slot in group.slots:
            node = slot.value.producer()
            layer = None if node is None else layer_of(node)
            if layer is None:
                continue
            rank = len(groups.facts.shapes[slot.value])
            axis = 1 if "Conv" in layer.node.op_type else rank - 1 if layer.index == 1 else rank - 2
            if slot.axis == axis:
                kept = result.setdefault(layer.name, np.ones(groups.facts.shapes[slot.value][axis], bool))
                kept[slot.positions[gone].ravel()] = False
    return result


def _matrix_rows(layer: Layer, kept: NDArray[np.bool_]) -> NDArray[np.bool_]:
    taps = int(np.prod(layer.kernel)) if layer.node.op_type == "ConvTranspose" else 1
    return np.repeat(kept, taps)
