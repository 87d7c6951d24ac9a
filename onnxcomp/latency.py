"""What a model's widths are worth on the target: the time of each node, measured inside the model at several widths.

Kernels work in blocks and change their layout by width, so time does not fall with FLOPs, and a node timed on its own
would pay for conversions that its neighbours spare it. So whole models are profiled, in each of which every group of
channels that shares no node with another is cut to the same share. Groups whose nodes have the same operators,
attributes and shapes count as one seen more often: each gets their median.
"""

import statistics
from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping, Sequence, Set

import numpy as np
import onnx_ir as ir

from onnxcomp.channels import ChannelGroup, ChannelGroups
from onnxcomp.core import Context, Pass
from onnxcomp.model import structure_hash
from onnxcomp.runtime import Feeds
from onnxcomp.surgery import SurgeryError, without
from onnxcomp.timing import for_timing, profiles, ratio
from onnxcomp.units import Units
from onnxcomp.widths import Counts, Floats

_ROUNDS = 4
_LEVELS = 8
"""A group is usually timed with 1/8, 2/8, ... of its channels gone."""


class LatencyModel:
    """The time of a model by the widths of its groups. A node in several groups scales with each of them.

    Args:
        groups: of the model.
        cuttable: for each group, how many channels may go, ascending from 0.
        context: target.
        feeds: one run at the batch size that counts.
        technique: what makes of each model what is timed, e.g. INT8; None for the models as they are.
        rounds: of profiles of each model.
        levels: a group is timed with so many widths, all of its channels among them.

    Attributes:
        counts: for each group, those of the numbers that were timed.
        touched: for each group, names of the nodes that read or write its channels.
    """

    def __init__(
        self,
        groups: ChannelGroups,
        cuttable: Sequence[Counts],
        context: Context,
        feeds: Feeds,
        technique: Pass | None = None,
        rounds: int = _ROUNDS,
        levels: int = _LEVELS,
    ) -> None:
        self.groups = tuple(groups)
        self._model, self._context, self._feeds = groups.model, context, feeds
        self._levels = levels
        self.touched = [_touched(group) for group in self.groups]
        self.counts = [_levels(group, counts, levels) for group, counts in zip(self.groups, cuttable, strict=True)]
        timing = for_timing(context)
        self._shares: list[dict[int, float]]
        self._times: Mapping[str, float]
        self._shares, self._times = context.recall(
            "widths",
            (structure_hash(groups.model), self.counts, technique, timing, feeds, rounds),
            lambda: self._measured(groups, timing, technique, rounds),
        )

    def _measured(
        self, groups: ChannelGroups, context: Context, technique: Pass | None, rounds: int
    ) -> tuple[list[dict[int, float]], Mapping[str, float]]:
        """Of each group, what is left of the time of its nodes by how many channels are gone; and the whole's times."""
        shares: list[dict[int, float]] = [{0: 1.0} for _ in self.groups]
        whole: Mapping[str, float] = {}
        units = Units(groups.model)
        touched = self.touched
        if technique is not None:  # what it made of a node has a name that leads back to the node's unit
            touched = [{units.of(name) for name in names} for names in touched]

        def made(model: ir.Model) -> ir.Model:
            return model if technique is None else technique.drafted()(model, context).model

        uncut = made(groups.model)
        for members in self._apart():
            variants = list(self._variants(groups, members))
            found = profiles([uncut, *(made(model) for _, model in variants)], context, self._feeds, rounds)
            whole, *cut = (profile.times if technique is None else units.times(profile) for profile in found)
            for (removed, _), times in zip(variants, cut, strict=True):
                for group, share in self._left(groups.model, removed, whole, times, touched):
                    shares[group][removed[group]] = share
        return shares, whole

    def _left(
        self,
        model: ir.Model,
        removed: Mapping[int, int],
        whole: Mapping[str, float],
        cut: Mapping[str, float],
        touched: Sequence[Set[str]],
    ) -> Iterator[tuple[int, float]]:
        """What is left of the time of each group's nodes, the median over groups of the same nodes and shapes.

        Of their sum, as what is fused into what changes with the width.
        """
        alike: dict[Hashable, list[tuple[int, float]]] = defaultdict(list)
        for group, count in removed.items():
            before, after = (sum(each.get(name, 0.0) for name in touched[group]) for each in (whole, cut))
            if before:
                alike[count, form_of(model, self.touched[group])].append((group, after / before))
        for members in alike.values():
            share = statistics.median(share for _, share in members)
            yield from ((group, share) for group, _ in members)

    def total(self, removed: Floats | None = None) -> float:
        """Microseconds per run with so many channels gone from each group."""
        times = dict(self._times)
        for group, count in enumerate([] if removed is None else removed.astype(int).tolist()):
            share = self.share(group, count)
            if share != 1:
                times |= {name: times[name] * share for name in self.touched[group] & times.keys()}
        return sum(times.values())

    def saving(self, group: int, removed: Floats, count: int) -> float:
        """Microseconds per run that removing some more channels of one group saves."""
        more = removed.copy()
        more[group] += count
        return self.total(removed) - self.total(more)

    def measured(self, model: ir.Model) -> float:
        """What another model takes, as a share of what this one does, timed side by side."""
        return ratio(self._model, model, self._context, self._feeds)

    def share(self, group: int, count: int) -> float:
        """What is left of the time of a group's nodes with so many of its channels gone."""
        shares = self._shares[group]
        return shares[max(known for known in shares if known <= count)]

    def _variants(self, groups: ChannelGroups, members: Sequence[int]) -> Iterator[tuple[dict[int, int], ir.Model]]:
        """Models with more and more channels gone from some groups, and how many of which."""
        before: dict[int, int] = {}
        for level in range(1, self._levels):
            removed = {}
            for index in members:
                counts = self.counts[index]
                goal = level * self.groups[index].size / self._levels
                removed[index] = int(counts[np.argmin(np.abs(counts - goal))])
            removed = {index: count for index, count in removed.items() if count}
            if removed == before:  # narrow groups have fewer widths than levels
                continue
            before = removed
            try:
                cut = without(groups, {self.groups[index]: range(count) for index, count in removed.items()})
            except SurgeryError:
                continue
            yield removed, cut

    def _apart(self) -> list[list[int]]:
        """The groups in sets of which no two share a node."""
        sets: list[tuple[list[int], set[str]]] = []
        for index, counts in enumerate(self.counts):
            if len(counts) < 2:
                continue
            for members, nodes in sets:
                if not nodes & self.touched[index]:
                    members.append(index)
                    nodes |= self.touched[index]
                    break
            else:
                sets.append(([index], set(self.touched[index])))
        return [members for members, _ in sets]


def form_of(model: ir.Model, names: Set[str]) -> Hashable:
    """What the time of some nodes depends on."""
    return tuple(
        (
            node.domain,
            node.op_type,
            str(sorted((name, str(attribute.value)) for name, attribute in node.attributes.items())),
            tuple(str(None if value is None else value.shape) for value in (*node.inputs, *node.outputs)),
        )
        for node in model.graph
        if node.name in names
    )


def _touched(group: ChannelGroup) -> set[str]:
    """Names of the nodes that read or write the group's channels."""
    nodes: set[str] = set()
    for slot in group.slots:
        nodes |= {use.node.name or "" for use in slot.value.uses()}
        producer = slot.value.producer()
        nodes |= {producer.name or ""} if producer is not None else set()
    return nodes


def _levels(group: ChannelGroup, counts: Counts, levels: int) -> Counts:
    """Of the numbers that may go, those nearest to each level, from 0."""
    goals = np.arange(levels) * group.size / levels
    return np.unique(counts[np.abs(counts[None] - goals[:, None]).argmin(axis=1)])
