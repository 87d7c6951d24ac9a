"""The data in their roles: what techniques learn from, what judges candidates, what scores the result once."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxcomp import metrics
from onnxcomp import model as models
from onnxcomp.data import ImageOptions, open_dataset, split
from onnxcomp.runtime import Session
from onnxcomp.samples import Dataset
from onnxcomp.synthetic import synthetic

RUN = 16
"""Samples per run when judging; some ONNX Runtime kernels differ by batch, so neither 1 nor hundreds."""


@dataclass
class Judges:
    """The data in their three roles, and what they are scored with."""

    tune: Dataset | None
    judge: Dataset
    final: Dataset
    metric: metrics.Metric
    description: str
    notes: list[str] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        model: ir.Model,
        specs: Sequence[models.TensorSpec],
        calib: Any,
        evaluation: Any,
        metric: str | None,
        images: ImageOptions | None,
        seed: int,
        most: int | None,
    ) -> "Judges":
        """Assign the data.

        Args:
            model: the original.
            specs: its inputs.
            calib: data to learn from, or None.
            evaluation: data to judge on, or None: then a part of `calib`.
            metric: as the user wrote it, or None for the default.
            images: how image files become inputs.
            seed: of the split.
            most: samples that judge candidates; None for all.
        """
        notes: list[str] = []
        chosen = metrics.parse_metric(metric) if metric else None
        learn = None if calib is None else open_dataset(calib, specs, images)
        proof = None if evaluation is None else open_dataset(evaluation, specs, images)
        if learn is not None and proof is not None:
            half = split(proof, seed)
            whole = half.shared
            final = proof if whole else proof.select(_complement(len(proof), seed))
            judge = proof if whole else proof.select(set(range(len(proof))) - set(_complement(len(proof), seed)))
            tune: Dataset | None = learn
        elif learn is not None and isinstance(chosen, metrics.UserMetric):
            tune = judge = final = learn  # the metric brings its own data, so all of these can be learnt from
            whole = True
        elif learn is not None or proof is not None:
            parts = split(learn if learn is not None else proof, seed)  # type: ignore[arg-type]
            tune, judge, final, whole = parts.tune, parts.judge, parts.final, parts.shared
        else:
            tune, whole = None, True
            judge = final = synthetic(specs, RUN, seed, models.vocabularies(model))
            notes.append(
                "No data were given: errors are measured on made-up inputs and say little about real ones, and "
                "techniques that need data stay off. Give --calib and --eval."
            )
        reason = "as asked"
        if chosen is None:
            probe = next(iter(final.batches(RUN)))
            chosen, reason = metrics.default_metric(probe.targets, Session(model).run(probe.feeds))
        if isinstance(chosen, metrics.UserMetric):
            description = f"{chosen.name}, called whole (judge = final)"
        else:
            if most is not None and len(judge) > most and not whole:
                judge = judge.select(np.random.default_rng(seed).permutation(len(judge))[:most].tolist())
            same = f"{len(final)} samples, too few to split (judge = final)"
            description = f"{chosen.name} ({reason}) on " + (
                same if whole else f"{len(final)} samples held out from the search, which judged on {len(judge)} others"
            )
        return cls(tune, judge, final, chosen, description, notes)

    def score(self, session: Session, reference: Session, *, final: bool = False) -> metrics.Score:
        """Score a model on the judge's data, or on the final ones."""
        data = self.final if final else self.judge
        return metrics.evaluate(self.metric, session.run, data, reference.run, RUN)


def _complement(count: int, seed: int) -> list[int]:
    """Half of the samples, drawn at random."""
    return sorted(np.random.default_rng(seed).permutation(count)[: count // 2].tolist())
