"""Times on the target, measured once: what the context's store knows is not measured again.

They go by what decides them (`model.structure_hash`), so those of a model that was trained again are known.
"""

from collections.abc import Sequence
from dataclasses import replace

import onnx_ir as ir

from onnxcomp import profiling
from onnxcomp.core import Context
from onnxcomp.model import structure_hash
from onnxcomp.profiling import Profile
from onnxcomp.runtime import Feeds, Protocol, Session, compare

_PROTOCOL = Protocol(block=5, rounds=9, warmup=2, seconds=5)

_SAMPLES = 8


def for_timing(context: Context) -> Context:
    """The context with few samples, too few to hand out: what INT8 takes does not depend on its ranges."""
    data = context.data
    few = None if data is None else data.at_most(_SAMPLES, context.seed)
    return replace(context, data=few, cache={}, executor=None)


def profiles(models: Sequence[ir.Model], context: Context, feeds: Feeds, rounds: int = 4) -> list[Profile]:
    """What each node of some models takes, as `profiling.profiles` has it."""
    known = [structure_hash(model) for model in models]
    return context.recall(
        "profiles", (known, feeds, rounds), lambda: profiling.profiles(models, context.target, feeds, rounds)
    )


def ratio(model: ir.Model, other: ir.Model, context: Context, feeds: Feeds, protocol: Protocol = _PROTOCOL) -> float:
    """What another model takes, as a share of what the first one does, timed side by side in this process."""

    def measured() -> float:
        sessions = [Session(each, context.target) for each in (model, other)]
        return 1 / compare(sessions, feeds, protocol)[1].speedup

    return context.recall("ratio", (structure_hash(model), structure_hash(other), feeds, protocol), measured)
