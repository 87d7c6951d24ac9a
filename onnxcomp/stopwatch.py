"""Models timed side by side in processes of their own."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from onnxcomp import runtime
from onnxcomp.fresh import files_of, fresh
from onnxcomp.runtime import Feeds, Protocol, Session, Target, Timing

if TYPE_CHECKING:
    import onnx_ir as ir

_PROCESSES = 3
_LEAST_ROUNDS = 3
"""In each of them."""


def time_apart(candidates: "Sequence[ir.Model]", target: Target, feeds: Feeds, protocol: Protocol) -> list[Timing]:
    """Time models beside the first, as `runtime.compare` does, in new processes.

    Where a session's memory happens to lie makes a difference of several percent that stays as long as the session.
    So the rounds are spread over several processes, which load the models in turn forwards and backwards; one does for
    a model alone.

    Raises:
        OnnxcompError: one of them failed.
    """
    processes = max(min(protocol.rounds // _LEAST_ROUNDS, _PROCESSES), 1) if len(candidates) > 1 else 1
    part = replace(protocol, rounds=-(-protocol.rounds // processes), seconds=protocol.seconds / processes)
    order = np.arange(len(candidates))
    tables = []
    with files_of(candidates) as paths:
        for number in range(processes):
            turn = order if number % 2 == 0 else order[::-1]
            table = fresh(timed, [paths[place] for place in turn], target, dict(feeds), part)
            tables.append(table[:, np.argsort(turn)])
    return runtime.summarised(np.concatenate(tables))


def timed(paths: Sequence[Path], target: Target, feeds: Feeds, protocol: Protocol) -> NDArray[np.float64]:
    """(rounds, models) seconds per run, in this process."""
    return runtime.block_seconds([Session(path, target) for path in paths], feeds, protocol)
