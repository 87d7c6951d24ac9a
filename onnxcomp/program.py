"""What can be chosen of a model, as a mixed-integer program: rows of options, and what choices cost together.

Sums have three columns: microseconds, errors of the outputs, and bytes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from onnxcomp.core import Option, Pass, Setting
from onnxcomp.numerics.choice import Clash, Term, choose_together

_PRICE, _EACH = 1e-2, 2e-4
"""Shares of the model's time that all of the error counts that may be, and each weight that is stored in few bytes,
where any may be so: that takes no time, and of all ways to keep a limit on size the one with least error is wanted."""


@dataclass(frozen=True, eq=False)
class Program:
    """What can be chosen: first whether each branch goes, then the option of each row, then each unit's precision.

    Attributes:
        errors: of each choice's options.
        sources: of these errors, by number.
        units: number of the choice by unit.
        options: precisions by unit.
        terms, clashes: what choices cost, in microseconds and error.
        apart: numbers of two choices each, one of which leaves things as they are.
        storing: numbers of the choices that are about bytes alone.
    """

    errors: Sequence[NDArray[np.float64]]
    sources: Sequence[int]
    units: Mapping[str, int]
    options: Mapping[str, Sequence[str]]
    terms: Sequence[Term]
    clashes: Sequence[Clash]
    apart: Sequence[tuple[int, int]]
    storing: Sequence[int] = ()

    def taken(self, found: Sequence[int]) -> tuple[float, float, float]:
        """Microseconds of units, and of conversions between them; bytes of units."""
        units, _, size = sum(term.costs[tuple(found[part] for part in term.parts)] for term in self.terms).tolist()
        crossings = 0.0
        for clash in self.clashes:
            part, counts = clash.first
            if counts[found[part]] and any(own[found[other]] for other, own in clash.others):
                crossings += float(clash.costs[0])
        return units, crossings, size

    def solved(self, error: float, size: float) -> list[int] | None:
        """The choices that take the least time; None where nothing keeps the limits.

        Args:
            error: that may be.
            size: bytes that units may take.
        """
        options, limits = [len(own) for own in self.errors], np.array([error, size])
        terms = [*self.terms]
        if self.storing:
            whole, priced = self.taken([0] * len(options))[0], np.eye(3)
            priced[1, 0] = _PRICE * whole / (min(error, sum(float(own.max()) for own in self.errors)) or 1.0)
            each = np.array([_EACH * whole, 0.0, 0.0])
            terms = [Term(term.parts, term.costs @ priced) for term in self.terms]
            terms += [Term((part,), np.outer(np.arange(options[part]) > 0, each)) for part in self.storing]
        return choose_together(options, terms, self.clashes, limits, apart=self.apart)

    def allows(self, found: Sequence[int]) -> bool:
        """Whether no two choices exclude each other."""
        return not any(found[first] and found[second] for first, second in self.apart)


@dataclass(frozen=True, eq=False)
class Row:
    """What can be done to one part of the model, as far as it is worth a thought; the first option is nothing.

    Attributes:
        part: name of a group of channels or of a layer.
        settings: (options,) what the pass takes for it: channels left, for a group.
        errors: (options,) of the outputs.
        shares: by precision (options,) of the time of the units that it touches.
        left: by precision (options,) of their bytes; not measured where those do not count.
        touched: these.
        technique: the pass; None for channels, which go together with branches, and for how a weight is stored.
        stored: (options - 1,) the pass of each option but the first that is about how a weight is stored.
    """

    part: str
    settings: tuple[Setting, ...]
    errors: NDArray[np.float64]
    shares: Mapping[str, NDArray[np.float64]]
    left: Mapping[str, NDArray[np.float64]]
    touched: set[str]
    technique: Pass | None = None
    stored: tuple[Pass, ...] = ()

    @property
    def narrows(self) -> bool:
        """Whether it is about channels."""
        return self.technique is None and not self.stored

    def excludes(self, other: "Row") -> bool:
        """Whether only one of both may be: what an option is worth holds for layers that nothing else has changed.

        But for fewer channels, upon which weights are stored as upon all.
        """
        return not (self.technique is None and other.technique is None) and bool(self.touched & other.touched)

    def option(self, number: int) -> Option:
        """As the pass takes it, which goes by part and setting; its latency is the same in all precisions."""
        share = next(iter(self.shares.values()))[number]
        return Option(self.part, self.settings[number], float(self.errors[number]), 0, float(share))
