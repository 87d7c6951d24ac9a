"""Saliency: what each channel of a group is worth, by the criterion of one's choice, over all layers that share it.

Weight criteria ask the layers that make the channels, activation criteria what the layers that read them take, after
the activation function; Wanda, OBD and OBS ask the weights of those readers together with what they meet. The formulas
stand in `numerics.saliency`; here is what goes into them.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from onnxcomp.calibration import calibrate
from onnxcomp.channels import ChannelGroup, ChannelGroups, Slot
from onnxcomp.core import Choice, Context
from onnxcomp.core import chosen as choice
from onnxcomp.members import Reader, constants_of, input_slot, readers, scales, writers
from onnxcomp.numerics import saliency as formulas
from onnxcomp.numerics.moments import Moments
from onnxcomp.numerics.obs import Consumer
from onnxcomp.numerics.saliency import Scores
from onnxcomp.observations import Gram, Statistics
from onnxcomp.samples import Dataset


class Criterion(Choice):
    """What makes a channel worth keeping."""

    OBS = "obs"
    OBD = "obd"
    L1 = "l1"
    L2 = "l2"
    L1_NONZERO = "l1-nonzero"
    L2_NONZERO = "l2-nonzero"
    ACTIVATION = "activation"
    ACTIVATION_STD = "activation-std"
    FEATURE_MAP = "feature-map"
    APOZ = "apoz"
    WANDA = "wanda"
    GAMMA = "gamma"
    FPGM = "fpgm"
    RANDOM = "random"

    @property
    def needs_data(self) -> bool:
        """Whether weights alone do not tell."""
        return self in _ACTIVITY or self in _READING


class Aggregate(Choice):
    """How the scores of the layers that share a group become one."""

    MEAN = "mean"
    MAX = "max"
    SUM = "sum"


_WEIGHTS: Mapping[Criterion, Callable[[NDArray[np.float64]], Scores]] = {
    Criterion.L1: formulas.l1,
    Criterion.L2: formulas.l2,
    Criterion.L1_NONZERO: formulas.l1_nonzero,
    Criterion.L2_NONZERO: formulas.l2_nonzero,
    Criterion.FPGM: formulas.fpgm,
    Criterion.GAMMA: formulas.gamma,
}
_ACTIVITY: Mapping[Criterion, Callable[[Moments], Scores]] = {
    Criterion.ACTIVATION: formulas.activation,
    Criterion.ACTIVATION_STD: formulas.activation_std,
    Criterion.FEATURE_MAP: formulas.feature_map,
    Criterion.APOZ: formulas.apoz,
}
_READING = {Criterion.WANDA, Criterion.OBD, Criterion.OBS}

Members = list[Scores]


def saliencies(
    groups: ChannelGroups,
    chosen: Sequence[ChannelGroup],
    criterion: Criterion | str,
    data: Dataset | None,
    context: Context,
    aggregate: Aggregate | str = Aggregate.MEAN,
    *,
    normalised: bool = True,
) -> list[NDArray[np.float64] | str]:
    """What each channel of some groups is worth; higher means keep.

    A weight that two layers share counts once, and so does a tensor that two layers read. OBD and OBS are relative to
    the mean square of the reader's output, so that they add up as they are.

    Args:
        groups: of the model.
        chosen: those to score.
        criterion: by what.
        data: the samples, gone through once for all groups; not touched by criteria that weights alone answer.
        context: target, memory cap, seed, progress, cache.
        aggregate: over the layers of a group.
        normalised: divide the scores of each layer by their mean first; groups compare then.

    Returns:
        Of each group (size,) scores, or the reason why the criterion says nothing of it.

    Raises:
        DataError: activations are not finite.
        OptionError: there is no such criterion or aggregate.
    """
    criterion, aggregate = choice(Criterion, criterion), choice(Aggregate, aggregate)
    found: Iterable[Members | str]
    if criterion is Criterion.RANDOM:
        found = ([formulas.random(group.size, context.seed, group.name)] for group in chosen)
    elif criterion in _WEIGHTS:
        found = (_of_weights(group, criterion) for group in chosen)
    elif data is None:
        found = ("the criterion needs calibration data" for _ in chosen)
    elif criterion in _ACTIVITY:
        found = _of_activity(groups, chosen, criterion, data, context)
    else:
        found = _of_reading(groups, chosen, criterion, data, context)
    return [
        members if isinstance(members, str) else formulas.combine(members, aggregate, normalised) for members in found
    ]


def _of_weights(group: ChannelGroup, criterion: Criterion) -> Members | str:
    if criterion is Criterion.GAMMA:
        slots, reason = scales(group), "no BatchNormalization scales its channels"
    else:
        slots, reason = (
            [writer.slot for writer in writers(group)],
            "no layer makes its channels with weights of its own",
        )
    return [_WEIGHTS[criterion](constants_of(slot)) for slot in dict.fromkeys(slots)] or reason


def _of_activity(
    groups: ChannelGroups, chosen: Sequence[ChannelGroup], criterion: Criterion, data: Dataset, context: Context
) -> Iterable[Members | str]:
    asked = [_inputs(group, _observable(groups, group)) for group in chosen]
    slots = [slot for each in asked if not isinstance(each, str) for slot in each]
    statistics = calibrate(groups.model, data, context, channels=slots) if slots else Statistics()
    for each in asked:
        if isinstance(each, str):
            yield each
            continue
        moments = [statistics.moments(slot) for slot in each]
        if criterion is Criterion.APOZ:  # what is never zero has no ReLU before it
            moments = [seen for seen in moments if (seen.nonzeros < seen.values.count).any()]
        yield [_ACTIVITY[criterion](seen) for seen in moments] or "none of the activations that are read is ever zero"


def _of_reading(
    groups: ChannelGroups, chosen: Sequence[ChannelGroup], criterion: Criterion, data: Dataset, context: Context
) -> Iterable[Members | str]:
    asked = [_observable(groups, group) for group in chosen]
    layers = {reader.layer.name: reader.layer for each in asked if not isinstance(each, str) for reader in each}
    grams = calibrate(groups.model, data, context, layers=list(layers.values())).grams if layers else {}
    for each in asked:
        yield each if isinstance(each, str) else [_read(reader, grams[reader.layer.name], criterion) for reader in each]


def _observable(groups: ChannelGroups, group: ChannelGroup) -> list[Reader] | str:
    """The layers that read the channels, if all of them can be observed."""
    found = readers(group)
    if any(reader.layer.node.graph is not groups.model.graph for reader in found):
        return "a body of control flow reads its channels"
    return found or "no layer reads its channels with weights of its own"


def _inputs(group: ChannelGroup, found: list[Reader] | str) -> list[Slot] | str:
    """Where the channels lie in what those layers take."""
    if isinstance(found, str):
        return found
    slots = [input_slot(group, reader.layer) for reader in found]
    known = [slot for slot in slots if slot is not None]
    return list(dict.fromkeys(known)) if len(known) == len(slots) else "the rank of what reads its channels is unknown"


def _read(reader: Reader, gram: Gram, criterion: Criterion) -> Scores:
    """By the weights of one reader; the groups of a grouped convolution are so many layers, of one output."""
    layer = reader.layer
    matrices = np.split(layer.matrix().astype(np.float64), layer.groups)
    columns = reader.columns
    if criterion is Criterion.WANDA:
        # Root mean squares stand for norms, which would grow with the number of samples.
        norms = np.sqrt(np.diagonal(gram.second_moment, axis1=1, axis2=2))
        return _total([formulas.wanda(weight, norm, columns) for weight, norm in zip(matrices, norms, strict=True)])
    moments = gram.covariance if layer.adds_bias else gram.second_moment  # a bias takes up the mean
    consumers = [Consumer(weight, H, columns) for weight, H in zip(matrices, moments, strict=True)]
    score = formulas.obd if criterion is Criterion.OBD else formulas.obs
    return _total([score(consumer) for consumer in consumers]) / (sum(each.energy for each in consumers) or 1.0)


def _total(parts: Members) -> Scores:
    return formulas.combine(parts, Aggregate.SUM, normalised=False)
