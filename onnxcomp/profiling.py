"""What each node of a model takes on the target, by ONNX Runtime's own profile of whole runs."""

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from onnxcomp.fresh import files_of, fresh
from onnxcomp.runtime import Feeds, NodeTime, Session, Target

if TYPE_CHECKING:
    import onnx_ir as ir

_DECORATION = re.compile(r"(_nchwc|_token_\d+|/duplicated|_transformed|/MatMul\w+Fusion/?)+$")
_BLOCK = 5
_LONGEST_BLOCK = 0.05
"""Seconds after which it ends, after two runs at least: some machines change their speed by a third each second."""
_MOST = 200
"""Runs of each model, where they take next to no time."""
_ENOUGH = 1.0
"""Seconds after which there are no more than are asked for."""


@dataclass(frozen=True)
class Profile:
    """What each node of a model took.

    Attributes:
        times: microseconds by node name; a node that ONNX Runtime fused into a neighbour has none.
        elements: size of each node's first output.
        untraced: microseconds of what ONNX Runtime put in by itself, under names that lead to no node.
    """

    times: Mapping[str, float]
    elements: Mapping[str, int]
    untraced: float = 0.0


def profiles(
    models: "Sequence[ir.Model]", target: Target, feeds: Feeds, rounds: int = 4, seconds: float = 20.0
) -> list[Profile]:
    """Profile models in turn in a new process, so that a drift of the machine's speed hits all alike.

    ONNX Runtime renames what it fuses or moves to another layout; names are traced back through its suffixes and
    through the outputs that a fused node writes.

    Args:
        models: with names on their nodes.
        target: where to run.
        feeds: one run.
        rounds: turns of five runs each, or more turns of fewer runs where those are slow; more of them where all that
            takes less than a second.
        seconds: begin no other turn after this long.
    """
    with files_of(models) as paths:
        events = fresh(_events, paths, target, dict(feeds), rounds, seconds)
    return [_traced(model, found) for model, found in zip(models, events, strict=True)]


def _events(
    paths: Sequence[Path], target: Target, feeds: Feeds, rounds: int, seconds: float
) -> list[Mapping[str, NodeTime]]:
    sessions = [Session(path, target, profile=True) for path in paths]
    start, wanted, runs = time.perf_counter(), rounds * _BLOCK, 0
    while runs < max(wanted, _MOST):
        if runs and time.perf_counter() - start > (seconds if runs < wanted else min(seconds, _ENOUGH)):
            break
        runs += min([_block(session, feeds) for session in sessions])
    return [session.profile() for session in sessions]


def _block(session: Session, feeds: Feeds) -> int:
    """Run a model a few times; how many."""
    start = time.perf_counter()
    for done in range(_BLOCK):
        session.run(feeds)
        if done and time.perf_counter() - start > _LONGEST_BLOCK:
            break
    return done + 1


def _traced(model: "ir.Model", events: Mapping[str, NodeTime]) -> Profile:
    by_output = {value.name: node.name or "" for node in model.graph for value in node.outputs}
    names = {node.name for node in model.graph}
    times: dict[str, float] = {}
    elements: dict[str, int] = {}
    untraced = 0.0
    for event, taken in events.items():
        plain = _DECORATION.sub("", event)
        name = plain if plain in names else by_output.get(plain)
        if name is None:
            untraced += taken.microseconds
            continue
        times[name] = times.get(name, 0.0) + taken.microseconds
        elements[name] = taken.elements
    return Profile(times, elements, untraced)
