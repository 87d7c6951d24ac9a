"""What was done, why, and what it brought: one value that the console, JSON and Python read."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from onnxcomp.budget import Budget
from onnxcomp.core import Change, Skip

SCHEMA_VERSION = 1


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
    """

    size: int
    latency: float | None = None
    latency_interval: tuple[float, float] | None = None
    speedup: float | None = None
    score: float | None = None
    score_interval: tuple[float, float] | None = None
    drop: float | None = None


@dataclass(frozen=True)
class Trial:
    """One candidate that the search looked at, and its verdict."""

    name: str
    figures: Figures
    verdict: str


@dataclass(frozen=True)
class Step:
    """One pass of the recipe, and what it did.

    Attributes:
        recipe: the pass with all its settings, as Python writes it.
        changes: what was done to which node.
        skips: what was left, and why.
    """

    recipe: str
    changes: tuple[Change, ...] = ()
    skips: tuple[Skip, ...] = ()


@dataclass(frozen=True)
class Report:
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
        steps: the recipe.
        trials: what else was tried.
        notes: what the user should know.
    """

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

    def to_json(self) -> dict[str, Any]:
        """The report as plain values, after `docs/report.schema.json`."""
        return {"schema": SCHEMA_VERSION, **asdict(self)}
