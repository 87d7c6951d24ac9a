"""One round of structured pruning: which channels a criterion gives up, how many of each group, and the cut itself.

What is learnt from data is learnt when it is first asked for, so that a weight criterion with plain rates runs nothing.
"""

from collections import defaultdict
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from onnxcomp.calibration import calibrate
from onnxcomp.channels import ChannelGroup, ChannelGroups
from onnxcomp.core import Context, Skip
from onnxcomp.effects import Answers, abroad
from onnxcomp.layers import Layer, layer_of
from onnxcomp.members import Reader, readers
from onnxcomp.model import content_hash
from onnxcomp.numerics.blas import as_pays
from onnxcomp.numerics.obs import Consumer, Elimination, eliminate, survivors, swapped
from onnxcomp.observations import Gram
from onnxcomp.saliency import Aggregate, Criterion, saliencies
from onnxcomp.samples import Dataset
from onnxcomp.surgery import SurgeryError, without
from onnxcomp.widths import Curve

DAMPING = 1e-2

_PROBES = 4
"""Widths of each group at which that is measured, evenly spaced."""


@dataclass(frozen=True, eq=False)
class Ranking:
    """The channels of a group by what they are worth.

    Attributes:
        order: (size,) the channel that goes first, second, ...
        scores: (size,) what each channel is worth, by its number in the group.
        errors: (size + 1,) error of the layers that read them when so many are gone, where the ranking gave it.
    """

    order: NDArray[np.int64]
    scores: NDArray[np.float64]
    errors: NDArray[np.float64] | None = None


@dataclass(frozen=True, eq=False)
class Cut:
    """A model with channels gone.

    Attributes:
        model: without them.
        outputs: by name of a layer or normalisation (out,) which of its output channels are left, where some are gone.
    """

    model: ir.Model
    outputs: Mapping[str, NDArray[np.bool_]]


class Pruner:
    """One model with its groups of channels.

    Args:
        groups: of the model.
        data: to learn from.
        context: target, exclusions, seed, memory.
        refit: whether the layers that read channels make up for those that go.
        answers: of the model, by which it is told what widths cost; by default on some of the data.

    Attributes:
        skips: groups that are left alone, and why; grows as reasons are found.
    """

    def __init__(
        self, groups: ChannelGroups, data: Dataset, context: Context, *, refit: bool, answers: Answers | None = None
    ) -> None:
        self.groups = groups
        self._data, self.context, self._refits, self._given = data, context, refit, answers
        self.skips: list[Skip] = []
        self._readers: dict[ChannelGroup, list[Reader]] = {}
        for group in groups:
            found = readers(group)
            reason = self._unreadable(group, found)
            if reason is None:
                self._readers[group] = found
            else:
                self.skips.append(Skip(group.name, reason))

    @property
    def cuttable(self) -> Container[ChannelGroup]:
        """The groups that layers read."""
        return self._readers.keys()

    def _unreadable(self, group: ChannelGroup, found: list[Reader]) -> str | None:
        nodes = [use.node for slot in group.slots if slot.value.const_value is not None for use in slot.value.uses()]
        if any(self.context.excludes(node) for node in nodes):
            return "excluded by the user"
        if not found:
            return "no layer reads its channels with weights of its own"
        if any(node.graph is not self.groups.model.graph for node in nodes):
            return "a body of control flow reads or makes its channels"
        if any(reader.layer.is_scaled for reader in found):
            return "a Gemm with alpha or beta reads its channels"
        return None

    # -- what is learnt from data -----------------------------------------------------------------------------------

    @cached_property
    def _grams(self) -> Mapping[str, Gram]:
        layers = {reader.layer.name: reader.layer for found in self._readers.values() for reader in found}
        return calibrate(self.groups.model, self._data, self.context, layers=list(layers.values())).grams

    @cached_property
    def _answers(self) -> Answers:
        return self._given or Answers(self.groups.model, self._data, self.context)

    def _moments(self, layer: Layer) -> NDArray[np.float64]:
        """H of a layer's inputs (groups, in, in); centred where its bias takes up their mean."""
        gram = self._grams[layer.name]
        return gram.covariance if layer.adds_bias else gram.second_moment

    def _consumers(self, group: ChannelGroup) -> list[Consumer]:
        """Each group of a grouped convolution is one."""
        return [
            Consumer(matrix, moment, reader.columns)
            for reader in self._readers[group]
            for matrix, moment in zip(_matrices(reader.layer), self._moments(reader.layer), strict=True)
        ]

    # -- which channels ---------------------------------------------------------------------------------------------

    def rank(
        self, criterion: Criterion, aggregate: Aggregate, normalised: bool, only: Container[str] | None = None
    ) -> dict[ChannelGroup, Ranking]:
        """The channels of every group that can be cut, or of those of some names, by a criterion.

        OBS removes them one after another, each time the one that costs least, and scores each by what it added then.
        The others score all at once. Groups that the criterion says nothing of are skipped, with that reason.
        """
        chosen = [group for group in self._readers if (only is None or group.name in only) and self._can_go(group)]
        if criterion is Criterion.OBS:
            return {group: self._eliminated(group) for group in chosen}
        found = {}
        scores = saliencies(self.groups, chosen, criterion, self._data, self.context, aggregate, normalised=normalised)
        for group, scored in zip(chosen, scores, strict=True):
            if isinstance(scored, str):
                self.skips.append(Skip(group.name, scored))
            else:
                found[group] = Ranking(np.argsort(scored, kind="stable"), scored)
        return found

    def _can_go(self, group: ChannelGroup) -> bool:
        """Whether surgery knows how, tried on one channel; else that is a skip."""
        try:
            without(self.groups, {group: [0]}, infer=False)
        except SurgeryError as error:
            self.skips.append(Skip(group.name, error.fact))
            return False
        return True

    def _eliminated(self, group: ChannelGroup) -> Ranking:
        if group.name not in self._eliminations:
            swept = self._swept(group)
            scores = np.empty(group.size)
            scores[swept.order] = np.diff(swept.errors)
            self._eliminations[group.name] = Ranking(swept.order, scores, swept.errors)
        return self._eliminations[group.name]

    def _swept(self, group: ChannelGroup, order: NDArray[np.int64] | None = None) -> Elimination:
        with as_pays(self._width(group)):
            return eliminate(self._consumers(group), DAMPING, order)

    def _width(self, group: ChannelGroup) -> int:
        """Of the inputs of the widest layer that reads a group."""
        return max(reader.layer.input_width for reader in self._readers[group])

    @cached_property
    def _eliminations(self) -> dict[str, Ranking]:
        """Rankings by OBS, by the group's name; those of the same model and data are kept for the next plan."""
        key = ("eliminations", content_hash(self.groups.model))
        data, known = self.context.cache.get(key, (None, {}))
        if data is not self._data:
            data, known = self.context.cache[key] = self._data, {}
        found: dict[str, Ranking] = known
        return found

    def swapped(self, group: ChannelGroup, gone: NDArray[np.int64]) -> NDArray[np.int64]:
        """As many channels whose loss costs the layers that read them no more."""
        with as_pays(self._width(group)):
            return swapped(self._consumers(group), gone, DAMPING)

    # -- what they cost ---------------------------------------------------------------------------------------------

    def curves(
        self, wanted: Mapping[ChannelGroup, tuple[Ranking, int]], places: int = _PROBES
    ) -> dict[ChannelGroup, Curve]:
        """The error of the model's outputs at every width of each group alone.

        The layers' errors at every width come from one sweep; what those do to the outputs is measured at a few widths
        and interpolated. Groups whose channels cannot be cut have none, and a skip.

        Args:
            wanted: of each group its ranking, and the most channels that may go.
            places: at how many widths outputs are compared.
        """
        refused: set[ChannelGroup] = set()
        tried: list[tuple[ChannelGroup, int]] = []

        def cuts() -> Iterator[ir.Model]:
            for group, (ranking, most) in wanted.items():
                for count in sorted({int(np.ceil(most * place / places)) for place in range(1, places + 1)} - {0}):
                    try:
                        cut = self.cut({group: ranking.order[:count]}, infer=False).model
                    except SurgeryError as error:
                        self.skips.append(Skip(group.name, error.fact))
                        refused.add(group)
                        break
                    tried.append((group, count))
                    yield cut

        effects: dict[ChannelGroup, dict[int, float]] = defaultdict(dict)
        for done, effect in enumerate(self._answers.errors(cuts(), *abroad(self.groups.model, self.context))):
            group, count = tried[done]
            effects[group][count] = effect
            self.context.progress(done, places * len(wanted), "measuring what channels are worth")
        return {
            group: self._curve(group, ranking, effects[group])
            for group, (ranking, _) in wanted.items()
            if group not in refused
        }

    def _curve(self, group: ChannelGroup, ranking: Ranking, effects: Mapping[int, float]) -> Curve:
        """From the errors of outputs by how many channels are gone."""
        order, errors = ranking.order, ranking.errors
        if errors is None:
            errors = self._swept(group, order).errors
        gains = [effect / max(errors[count], 1e-12) for count, effect in effects.items()]
        gain = np.interp(np.arange(len(errors)), [*effects], gains)
        return Curve(order, np.maximum.accumulate(errors * gain))

    # -- the cut ----------------------------------------------------------------------------------------------------

    def cut(self, removed: Mapping[ChannelGroup, NDArray[np.int64]], *, infer: bool = True) -> Cut:
        """The model without channels, and with least squares on what is left of each layer that read them.

        Args:
            removed: which channels of which groups.
            infer: shapes of the model.

        Raises:
            SurgeryError: a size is computed in a way that is not understood.
        """
        pruned = without(self.groups, {group: gone.tolist() for group, gone in removed.items()}, infer=infer)
        outputs = _kept_outputs(self.groups, removed)
        if not self._refits:
            return Cut(pruned, outputs)
        layers: dict[str, Layer] = {}
        gone_columns: dict[str, list[NDArray[np.int64]]] = defaultdict(list)
        for group, gone in removed.items():
            for layer, columns in self._readers[group]:
                layers[layer.name] = layer
                gone_columns[layer.name].append(columns[gone].ravel())
        twins = {node.name: node for node in pruned.graph.all_nodes()}
        for name, parts in gone_columns.items():
            layer, twin = layers[name], layer_of(twins[name])
            assert twin is not None
            kept = np.ones(layer.input_width, bool)
            kept[np.concatenate(parts)] = False
            matrices, moments = _matrices(layer), self._moments(layer)
            fitted = [survivors(matrix, H, kept, DAMPING) for matrix, H in zip(matrices, moments, strict=True)]
            rows = outputs.get(name, np.ones(layer.outputs, bool))
            if layer.adds_bias:
                means = self._grams[name].mean
                shifts = [W @ mean - V @ mean[kept] for W, V, mean in zip(matrices, fitted, means, strict=True)]
                twin.set_bias((np.concatenate(shifts) + layer.bias_vector())[rows])
            matrix = np.concatenate(fitted)
            twin.set_matrix(matrix[np.repeat(rows, len(matrix) // len(rows))])
        return Cut(pruned, outputs)


def together(parts: Sequence[Cut]) -> Mapping[str, NDArray[np.bool_]]:
    """Which output channels of the first model's layers are left after one cut upon another."""
    result: dict[str, NDArray[np.bool_]] = {}
    for part in parts:
        for name, kept in part.outputs.items():
            whole = result.setdefault(name, np.ones(len(kept), bool))
            whole[np.flatnonzero(whole)[~kept]] = False
    return result


def _matrices(layer: Layer) -> list[NDArray[np.float64]]:
    """The layer's matrix, of each group."""
    return np.split(layer.matrix().astype(np.float64), layer.groups)


def _kept_outputs(
    groups: ChannelGroups, removed: Mapping[ChannelGroup, NDArray[np.int64]]
) -> dict[str, NDArray[np.bool_]]:
    result: dict[str, NDArray[np.bool_]] = {}
    for group, gone in removed.items():
        for name, channels, positions in _made(groups, group):
            kept = result.setdefault(name, np.ones(channels, bool))
            kept[positions[gone].ravel()] = False
    return result


def _made(groups: ChannelGroups, group: ChannelGroup) -> Iterator[tuple[str, int, NDArray[np.int64]]]:
    """The nodes whose output holds the group along its channel axis: name, channels, and where."""
    for slot in group.slots:
        node = slot.value.producer()
        if node is None:
            continue
        layer, shape = layer_of(node), groups.facts.shapes[slot.value]
        normalises = node.op_type == "BatchNormalization" and slot.axis == 1
        if normalises or (layer is not None and slot.axis == layer.output_axis % len(shape)):
            yield node.name or "", shape[slot.axis], slot.positions
