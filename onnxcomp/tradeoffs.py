"""What conflicts with what: which limit would have to give way, and which results are worth choosing from."""

from collections.abc import Iterable, Iterator, Sequence

from onnxcomp.budget import Budget, Check
from onnxcomp.report import Figures, Trial
from onnxcomp.wording import check_in_words


def giving_way(budget: Budget, original: Figures, trials: Iterable[Trial], metric: str) -> Iterator[str]:
    """For each limit, by how much it would have to give way for all others to hold, as far as candidates show.

    Where no candidate keeps all limits but one, what the nearest breaks.

    Args:
        budget: with at least one limit.
        original: figures of the original.
        trials: what was found.
        metric: name of what a drop is one of.
    """
    broken: list[tuple[Trial, list[Check]]] = []
    for trial in trials:
        if trial.figures.drop is not None and (trial.figures.speedup is not None or not budget.limits_time):
            checks = [check for check in budget.checks(original, trial.figures) if not check.passed]
            broken.append((trial, checks))
    alone = [(trial, checks[0]) for trial, checks in broken if len(checks) == 1]
    for limit in dict.fromkeys(check.limit for _, check in alone):
        trial, check = min(((t, c) for t, c in alone if c.limit == limit), key=lambda pair: _excess(pair[1]))
        if _excess(check) < float("inf"):
            yield (
                f"All else holds if --{limit} gives way by {_amount(check)}: "
                f"{check_in_words(check, metric)} ('{trial.name}')."
            )
    several = [(trial, checks) for trial, checks in broken if len(checks) > 1]
    if several and not alone:
        trial, checks = min(several, key=lambda pair: sum(map(_excess, pair[1])))
        said = "; ".join(f"--{check.limit} by {_amount(check)}" for check in checks)
        yield f"No candidate breaks one limit alone. '{trial.name}' comes nearest if several give way: {said}."


def _excess(check: Check) -> float:
    """By what share of itself a limit is broken; infinite where nothing is known."""
    more = check.bound - check.value if check.limit == "min-speedup" else check.value - check.bound
    return more / max(abs(check.bound), 1e-9) if more == more else float("inf")


def _amount(check: Check) -> str:
    """By how much a limit is broken, in its own unit."""
    more = abs(check.value - check.bound)
    match check.limit:
        case "max-drop":
            return f"{more:.4g}"
        case "max-latency":
            return f"{1e3 * more:.3g} ms"
        case "min-speedup":
            return f"{more:.2f}x"
        case _:
            return f"{more:,.0f} bytes"


def undominated(figures: Sequence[Figures]) -> list[int]:
    """Places of those that no other beats or equals in loss, latency and size at once, the fastest first."""
    points = [(each.drop, each.latency, each.size) for each in figures]
    kept = []
    for place, (drop, latency, size) in enumerate(points):
        if drop is None or latency is None:
            continue
        beaten = any(
            other != place
            and d is not None
            and t is not None
            and (d <= drop and t <= latency and s <= size)
            and ((d, t, s) != (drop, latency, size) or other < place)
            for other, (d, t, s) in enumerate(points)
        )
        if not beaten:
            kept.append(place)
    return sorted(kept, key=lambda place: points[place][1] or 0.0)
