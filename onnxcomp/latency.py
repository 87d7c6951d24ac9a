"""What a model's widths are worth on the target: the time of each node, measured inside the model at several widths.

Kernels work in blocks and change their layout by width, so time does not fall with FLOPs, and a node timed on its own
would pay for conversions that its neighbours spare it. So whole models are profiled, in each of which every group of
channels that shares no node with another is cut to the same share. Nodes of the same operator, attributes and shapes
share what they took, which makes a table of few entries, each seen often.
"""

import statistics
from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence

import numpy as np
import onnx_ir as ir

from onnxcomp.channels import ChannelGroup, ChannelGroups
from onnxcomp.core import Context
from onnxcomp.profiling import profiles
from onnxcomp.runtime import Feeds, Protocol, Session, compare
from onnxcomp.surgery import SurgeryError, without
from onnxcomp.widths import Counts, Floats

_PROTOCOL = Protocol(block=5, rounds=9, warmup=2, seconds=5)

_LEVELS = 8
"""A group is timed with 1/8, 2/8, ... of its channels gone."""


class LatencyModel:
    """The time of a model by the widths of its groups. A node in several groups scales with each of them.

    Args:
        groups: of the model.
        cuttable: for each group, how many channels may go, ascending from 0.
        context: target.
        feeds: one run at the batch size that counts.

    Attributes:
        counts: for each group, those of the numbers that were timed.
    """

    def __init__(self, groups: ChannelGroups, cuttable: Sequence[Counts], context: Context, feeds: Feeds) -> None:
        self.groups = tuple(groups)
        self._model, self._target, self._feeds = groups.model, context.target, feeds
        self._touched = [_touched(group) for group in self.groups]
        self.counts = [_levels(group, counts) for group, counts in zip(self.groups, cuttable, strict=True)]
        self._shares: list[dict[int, dict[str, float]]] = [{0: {}} for _ in self.groups]
        variants = list(self._variants(groups))
        models = [groups.model, *(model for _, model in variants)]
        found = [profile.times for profile in profiles(models, context.target, feeds)]
        table: dict[Hashable, list[float]] = defaultdict(list)
        keys = [self._keys(model) for model in models]
        for times, key in zip(found, keys, strict=True):
            for name, time in times.items():
                if name in key:
                    table[key[name]].append(time)
        typical = {key: statistics.median(times) for key, times in table.items()}
        self._times = {name: typical[key] for name, key in keys[0].items() if key in typical}
        for (removed, _), key in zip(variants, keys[1:], strict=True):
            for group, count in removed.items():
                self._shares[group][count] = {
                    name: typical.get(key.get(name), 0.0) / self._times[name]
                    for name in self._touched[group]
                    if self._times.get(name)
                }

    def total(self, removed: Floats | None = None) -> float:
        """Microseconds per run with so many channels gone from each group."""
        gone = np.zeros(len(self.groups)) if removed is None else removed
        times = dict(self._times)
        for group, count in enumerate(gone.astype(int).tolist()):
            for name, share in self._at(group, count).items():
                times[name] *= share
        return sum(times.values())

    def saving(self, group: int, removed: Floats, count: int) -> float:
        """Microseconds per run that removing some more channels of one group saves."""
        more = removed.copy()
        more[group] += count
        return self.total(removed) - self.total(more)

    def measured(self, model: ir.Model) -> float:
        """What another model takes, as a share of what this one does, timed side by side."""
        sessions = [Session(each, self._target) for each in (self._model, model)]
        return 1 / compare(sessions, self._feeds, _PROTOCOL)[1].speedup

    def _at(self, group: int, count: int) -> dict[str, float]:
        shares = self._shares[group]
        return shares[max(known for known in shares if known <= count)]

    def _variants(self, groups: ChannelGroups) -> Iterator[tuple[dict[int, int], ir.Model]]:
        for together in self._apart():
            for level in range(1, _LEVELS):
                removed = {}
                for index in together:
                    counts = self.counts[index]
                    goal = level * self.groups[index].size / _LEVELS
                    removed[index] = int(counts[np.argmin(np.abs(counts - goal))])
                removed = {index: count for index, count in removed.items() if count}
                if not removed:
                    continue
                try:
                    yield removed, without(groups, {self.groups[i]: range(count) for i, count in removed.items()})
                except SurgeryError:
                    continue

    def _apart(self) -> list[list[int]]:
        """The groups in sets of which no two share a node."""
        sets: list[tuple[list[int], set[str]]] = []
        for index, counts in enumerate(self.counts):
            if len(counts) < 2:
                continue
            for members, nodes in sets:
                if not nodes & self._touched[index]:
                    members.append(index)
                    nodes |= self._touched[index]
                    break
            else:
                sets.append(([index], set(self._touched[index])))
        return [members for members, _ in sets]

    def _keys(self, model: ir.Model) -> dict[str, Hashable]:
        """What the time of each node depends on."""
        return {
            node.name or "": (
                node.op_type,
                node.domain,
                str(sorted((name, str(attribute.value)) for name, attribute in node.attributes.items())),
                tuple(str(None if value is None else value.shape) for value in (*node.inputs, *node.outputs)),
            )
            for node in model.graph
        }


def _touched(group: ChannelGroup) -> set[str]:
    """Names of the nodes that read or write the group's channels."""
    nodes: set[str] = set()
    for slot in group.slots:
        nodes |= {use.node.name or "" for use in slot.value.uses()}
        producer = slot.value.producer()
        nodes |= {producer.name or ""} if producer is not None else set()
    return nodes


def _levels(group: ChannelGroup, counts: Counts) -> Counts:
    """Of the numbers that may go, those nearest to each level, from 0."""
    goals = np.arange(_LEVELS) * group.size / _LEVELS
    return np.unique(counts[np.abs(counts[None] - goals[:, None]).argmin(axis=1)])
