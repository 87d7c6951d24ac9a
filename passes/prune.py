"""Structured pruning: whole channels go, with all that belongs to them, and what is left makes up for them.

1. Coupled channels are found (`channels`), and the layers that read each group.
2. A criterion ranks the channels of each group (`saliency`); by default group OBS on the Gram matrices of those layers.
3. One sweep in that order gives the layers' error at every width; what it does to the outputs is measured.
4. Widths: the least error for the cost that is to remain, or plain rates (`widths`).
5. Channels that went are swapped for others where that costs less; then surgery, least squares on the survivors, and
   every layer fitted again on the inputs that the pruned model gives it, those in a row together.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, ClassVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from onnxcomp.branches import Branch, Operands, branches, named, spared, without_branches
from onnxcomp.channels import ChannelGroup, channel_groups
from onnxcomp.core import CHANNELS_LEFT, NOT_NAMED, Change, Context, Outcome, Pass, Skip, Width
from onnxcomp.errors import OnnxcompError, OptionError
from onnxcomp.graph import remove_unused
from onnxcomp.latency import LatencyModel
from onnxcomp.layers import Layer, layers
from onnxcomp.model import free_inputs, spec_of
from onnxcomp.numerics.saliency import penalised
from onnxcomp.pruning import Cut, Pruner, Ranking, together
from onnxcomp.reconstruction import reconstruct
from onnxcomp.saliency import Aggregate, Criterion
from onnxcomp.samples import Dataset, Feeds
from onnxcomp.settings import within
from onnxcomp.widths import Cost, CostModel, Curve, Priced, Rates, allocate, below, by_score, by_share, may_go

_TIMED = 3
"""Times that a latency is measured and the widths chosen again."""


@dataclass(frozen=True)
class Prune(Pass):
    """Structured pruning to a share of a cost.

    Attributes:
        remains: share of the cost that is to remain.
        cost: which cost.
        criterion: what makes a channel worth keeping.
        aggregate: how the scores of the layers that share a group become one; OBS always adds them up.
        normalised: divide each layer's scores by their mean first.
        rates: how it is decided how many channels each group loses.
        penalty: lambda in score - lambda cost, with the cost that one channel saves over its mean (Molchanov 2017).
        threshold: channels that score less go, whatever then remains of the cost; None prunes to what is to remain.
        rounds: in how many rounds, each of which ranks what is left anew.
        reconstruct: least squares on the survivors, and every layer fitted again after the channels are gone.
        jointly: also fit the layers of a row together, which takes longer than all else.
        multiple: widths are multiples of this in groups of as many channels.
        least: share of its channels that every group keeps; one always stays.
        parts: channels left by the name of a group; where any is named, no other is cut, in one round.
        branches: by the name of a sum, which of its operands goes too, 0 or 1, before all is fitted again together.

    Raises:
        OptionError: a setting out of range, or both a share that remains and a threshold.
    """

    name: ClassVar[str] = "prune"
    summary: ClassVar[str] = "structured pruning: coupled channels go physically, the others are fitted again"

    remains: Annotated[float, within(above=0, most=1)] = 0.7
    cost: Cost = Cost.FLOPS
    criterion: Criterion = Criterion.OBS
    aggregate: Aggregate = Aggregate.MEAN
    normalised: bool = True
    rates: Rates = Rates.MEASURED
    penalty: Annotated[float, within(0)] = 0.0
    threshold: float | None = None
    rounds: Annotated[int, within(1)] = 1
    reconstruct: bool = True
    jointly: bool = True
    multiple: Annotated[int, within(1)] = 2
    least: Annotated[float, within(0, 1)] = 0.1
    parts: tuple[tuple[str, Annotated[int, within(1)]], ...] = ()
    branches: Operands = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.threshold is not None and self.remains != Prune.remains:
            raise OptionError(
                f"a remaining share of {self.remains:.4g} and a threshold of {self.threshold:.4g} exclude each other",
                remedy="leave one of them out",
                setting=("threshold",),
            )

    def apply(self, model: ir.Model, context: Context) -> Outcome:
        """Trace, choose, cut; then fit."""
        if any(spec_of(value) is None for value in free_inputs(model)):
            return Outcome(model, (), (Skip("model", "an input is no tensor, so that shapes cannot be observed"),))
        data = context.samples(model)
        cuts: list[Cut] = []
        skips: dict[Skip, None] = {}
        widths: dict[str, Width] = {}
        goal: float | None = None
        traced: ir.Model | None = None
        known: list[Branch] = []
        gone: list[Branch] = []
        cuttable: dict[str, ChannelGroup] = {}  # as they were
        for done in range(1 if self.parts else self.rounds):
            try:
                groups = channel_groups(cuts[-1].model if cuts else model, next(iter(data.batches(1))).feeds)
            except OnnxcompError as error:
                skips[Skip("model", f"its channels cannot be traced: {error.fact}")] = None
                break
            if traced is None:
                traced, known = groups.model, branches(groups.model, groups.facts.shapes)
                gone = named(known, self.branches, "branches")
            pruner = Pruner(groups, data, context, refit=self.reconstruct)
            if self.parts:
                rankings = pruner.rank(self.criterion, self.aggregate, self.normalised, dict(self.parts))
                removed = self._named(pruner, rankings)
            else:
                rankings = pruner.rank(self.criterion, self.aggregate, self.normalised)
                plan = _Plan(self, pruner, rankings, _run(data, context))
                goal = plan.cost.total() * self.remains if goal is None else goal
                removed = plan.removed((goal / (plan.cost.total() or 1.0)) ** (1 / (self.rounds - done)))
            skips |= dict.fromkeys([*(Skip(frozen.name, frozen.reason) for frozen in groups.frozen), *pruner.skips])
            able = pruner.cuttable if self.parts else rankings
            cuttable = {group.name: group for group in groups if group in able} | cuttable
            for group, ranking in rankings.items():
                widths[group.name] = _narrowed(widths.get(group.name), group, ranking, removed.get(group))
            if removed:
                cuts.append(pruner.cut(removed))
        if traced is None:
            return Outcome(model, (), tuple(skips))
        pruned = cuts[-1].model if cuts else model
        if gone:
            pruned = without_branches(pruned, [(branch.join, branch.operand) for branch in gone])
            skips |= dict.fromkeys(spared(traced, known, gone, NOT_NAMED))
        changes = [change for branch in gone for change in branch.changes()]
        lost = {change.node for change in changes}
        narrow = [width for width in widths.values() if len(width.kept) < width.size]
        note = ", chosen on made-up inputs" if context.data is None and self._learns else ""
        narrower = [Change(name, f"{what}{note}") for name, what in _narrower(traced, pruned, cuttable, narrow)]
        changes += [change for change in narrower if change.node not in lost]
        skips |= dict.fromkeys(self._left(cuttable, {width.group for width in narrow}))
        if changes and self.reconstruct:
            fitted, unfitted = reconstruct(traced, pruned, together(cuts), data, context, jointly=self.jointly)
            changes += fitted
            skips |= dict.fromkeys(unfitted)
        if changes:
            remove_unused(pruned)  # the weights as they were before
        left = tuple(skip for skip in skips if skip.node not in lost)
        return Outcome(pruned, tuple(changes), left, tuple(widths.values()))

    def _named(self, pruner: Pruner, rankings: Mapping[ChannelGroup, Ranking]) -> dict[ChannelGroup, NDArray[np.int64]]:
        """The channels that go where it is said how many stay.

        Raises:
            OptionError: there is no such group, or it has not so many channels.
        """
        groups = {group.name: group for group in pruner.groups}
        removed = {}
        for name, kept in self.parts:
            group, setting = groups.get(name), ("parts", name)
            if group is None:
                known = ", ".join(groups) or "none"
                raise OptionError(
                    f"there is no group of channels '{name}'", remedy=f"those there are: {known}", setting=setting
                )
            if kept > group.size:
                raise OptionError(
                    f"group '{name}' has {group.size} channels, and cannot keep {kept}",
                    remedy=f"give 1 to {group.size}",
                    setting=setting,
                )
            if group in rankings and kept < group.size:
                removed[group] = rankings[group].order[: group.size - kept]
        return self._swapped(pruner, removed)

    def _swapped(
        self, pruner: Pruner, removed: Mapping[ChannelGroup, NDArray[np.int64]]
    ) -> dict[ChannelGroup, NDArray[np.int64]]:
        """What a sweep chose, one after another, may be better together."""
        if self.criterion is not Criterion.OBS:
            return dict(removed)
        return {group: pruner.swapped(group, order) for group, order in removed.items()}

    @property
    def _learns(self) -> bool:
        """Whether data tell which channels go."""
        return self.criterion.needs_data or self.rates is Rates.MEASURED

    def _left(self, cuttable: Mapping[str, ChannelGroup], narrow: Collection[str]) -> Iterator[Skip]:
        """Why layers make all channels that they made."""
        makers = {name for group in narrow for name in cuttable[group].made_by}
        for name, group in cuttable.items():
            if name not in narrow:
                yield from (Skip(maker, self._reason(group)) for maker in group.made_by if maker not in makers)

    def _reason(self, group: ChannelGroup) -> str:
        if self.parts:
            return NOT_NAMED
        if len(may_go(group.size, self.least, self.multiple)) == 1:
            return f"at least {self.least:.0%} of its channels, in steps of {self.multiple}, are all of them"
        if self.threshold is not None:
            return f"its channels score {self.threshold:g} or more"
        return "the target is met without it"


class _Plan:
    """How many channels go from each group."""

    def __init__(self, settings: Prune, pruner: Pruner, rankings: Mapping[ChannelGroup, Ranking], feeds: Feeds) -> None:
        self._settings, self._pruner, self._rankings = settings, pruner, rankings
        groups = pruner.groups
        self._counts = [
            may_go(group.size, settings.least, settings.multiple) if group in rankings else np.zeros(1, np.int64)
            for group in groups
        ]
        self.cost: Priced
        if settings.cost is Cost.LATENCY:
            self.cost = LatencyModel(groups, self._counts, pruner.context, feeds)
            self._counts = self.cost.counts
        else:
            self.cost = CostModel(groups, settings.cost)

    def removed(self, share: float) -> dict[ChannelGroup, NDArray[np.int64]]:
        """The channels that go so that a share of the cost remains.

        A latency is predicted from that of nodes, so the model is cut and timed, and the goal is set lower or higher by
        what the prediction was off.
        """
        goal, removed = share, self._removed(share)
        if not isinstance(self.cost, LatencyModel) or self._settings.threshold is not None:
            return removed
        tried = {}
        for _ in range(_TIMED):
            ratio = self.cost.measured(self._pruner.cut(removed).model)
            tried[abs(ratio - share)] = removed
            goal *= share / ratio
            removed = self._removed(goal)
        return tried[min(tried)]

    def _removed(self, share: float) -> dict[ChannelGroup, NDArray[np.int64]]:
        settings, groups = self._settings, self._pruner.groups
        if settings.threshold is not None:
            counts = below(self._scores, settings.threshold, self._counts)
        elif settings.rates is Rates.GLOBAL:
            counts = by_score(self.cost, self._scores, share, self._counts)
        elif settings.rates is Rates.LOCAL:
            counts = by_share(self.cost, self._scores, share, self._counts)
        else:
            counts = allocate(self.cost, self._curves, share, self._counts)
        gone = {
            group: self._rankings[group].order[:count]
            for group, count in zip(groups, counts.tolist(), strict=True)
            if count
        }
        return settings._swapped(self._pruner, gone)

    @cached_property
    def _curves(self) -> list[Curve | None]:
        pruner = self._pruner
        wanted = {
            group: (self._rankings[group], int(allowed[-1]))
            for group, allowed in zip(pruner.groups, self._counts, strict=True)
            if len(allowed) > 1
        }
        found = pruner.curves(wanted)
        return [found.get(group) for group in pruner.groups]

    @cached_property
    def _scores(self) -> list[NDArray[np.float64] | None]:
        """By group, minus what a channel costs."""
        rankings = [self._rankings.get(group) for group in self._pruner.groups]
        nothing, most = np.zeros(len(rankings)), [max(int(counts[-1]), 1) for counts in self._counts]
        saved = [self.cost.saving(index, nothing, count) / count for index, count in enumerate(most)]
        relative = np.array(saved) / (float(np.sum(saved)) / max(len(saved), 1) or 1.0)
        return [
            None if ranking is None else penalised(ranking.scores, one, self._settings.penalty)
            for ranking, one in zip(rankings, relative, strict=True)
        ]


def _narrower(
    before: ir.Model, after: ir.Model, groups: Mapping[str, ChannelGroup], narrow: Iterable[Width]
) -> Iterator[tuple[str, str]]:
    """The layers that make or read fewer channels than before, and what else makes those of a group; with how many."""
    old, new = ({layer.name: layer for layer in layers(model)} for model in (before, after))
    for name in (name for name in old if name in new):
        for side, channels in (("", Layer.by_output), ("input ", Layer.by_input)):
            size, left = (len(channels(layer)) for layer in (old[name], new[name]))
            if left < size:
                yield name, f"{left} of {size} {side}{CHANNELS_LEFT}"
    for width in narrow:
        for name in groups[width.group].made_by:
            if name not in old:
                yield name, f"{len(width.kept)} of {width.size} {CHANNELS_LEFT}"


def _run(data: Dataset, context: Context) -> Feeds:
    """One run of the batch size that latency counts at."""
    rows = data.select(row % len(data) for row in range(context.batch))
    return next(iter(rows.batches(context.batch))).feeds


def _narrowed(known: Width | None, group: ChannelGroup, ranking: Ranking, gone: NDArray[np.int64] | None) -> Width:
    """A group after one more round; its channels keep the numbers that they began with."""
    kept = np.arange(group.size) if known is None else np.asarray(known.kept)
    saliency = np.zeros(group.size) if known is None else np.asarray(known.saliency)
    saliency[kept] = ranking.scores
    left = kept if gone is None else np.delete(kept, gone)
    return Width(group.name, len(saliency), tuple(left.tolist()), tuple(saliency.tolist()))
