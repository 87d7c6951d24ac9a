"""Numbers, names and limits in words, alike on the terminal and on the page."""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

from onnxcomp.budget import Budget, Check
from onnxcomp.report import Figures, Interval

_QUOTED = re.compile("'[^']*'")
_FRACTION = re.compile(r"\b\d+(?:\.\d+(?:e[+-]?\d+)?|e[+-]?\d+)\b")


def printable(text: str) -> str:
    """The text with control characters escaped, line ends excepted."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def byte_count(count: float) -> str:
    """`1.53 MB`: three digits and a decimal unit."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if count >= 0.9995 * size:
            return f"{digits(count / size)} {unit}"
    return f"{count:.0f} B"


def seconds(value: float) -> str:
    """`1.23 ms`: three digits and the unit that fits."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if value >= 0.9995 * size:
            return f"{digits(value / size)} {unit}"
    return f"{digits(value * 1e6)} us"


def count(value: float) -> str:
    """`1.2 M`: of parameters or operations."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("K", 1e3)):
        if value >= 0.9995 * size:
            return f"{digits(value / size)} {unit}"
    return f"{value:.0f}"


def several(number: int, one: str, more: str | None = None) -> str:
    """`1 node` or `2 nodes`."""
    return f"{number} {one if number == 1 else more or f'{one}s'}"


def score(metric: str, value: float | None) -> str:
    """A metric's value: a share as a percentage, anything else with four digits."""
    if value is None:
        return "-"
    return f"{100 * value:.2f}%" if is_share(metric) else f"{value:.4g}"


def loss(metric: str, value: float | None) -> str:
    """A drop in the metric's unit, in words."""
    if value is None:
        return "-"
    if value == 0:
        return "no loss"
    amount = f"{100 * abs(value):.2f} points" if is_share(metric) else f"{abs(value):.4g}"
    return f"{amount} {'worse' if value > 0 else 'better'}"


def signed(metric: str, value: float) -> str:
    """A drop in the metric's unit, as a number; a minus is a gain."""
    return f"{100 * value:+.2f}" if is_share(metric) else f"{value:+.3g}"


def ratio(value: float, more: str, less: str, interval: Interval | None = None) -> str:
    """`2.19x faster [2.10x, 2.24x]`, or `1.10x slower` for a ratio below 1, whose interval is turned round too."""
    if value < 1:
        value, more = 1 / value, less
        interval = None if interval is None else (1 / interval[1], 1 / interval[0])
    return f"{value:.2f}x {more}" + between(interval, lambda end: f"{end:.2f}x")


def digits(value: float) -> str:
    """Three of them."""
    return f"{value:.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"


def is_share(metric: str) -> bool:
    """Whether a metric is a share of the samples, told in percent and points."""
    return metric.partition(":")[0] in {"accuracy", "top5", "agreement"}


def between(interval: Interval | None, form: Callable[[float], str]) -> str:
    """` [low, high]`, or nothing."""
    return "" if interval is None else f" [{form(interval[0])}, {form(interval[1])}]"


def latency_of(figures: Figures) -> str:
    """Median and interval."""
    return "-" if figures.latency is None else seconds(figures.latency) + between(figures.latency_interval, seconds)


def budget_in_words(budget: Budget, metric: str) -> str:
    """The limits as a user would say them; empty without any."""
    limits = []
    if budget.max_drop is not None:
        share = is_share(metric)
        limits.append(
            f"a drop of at most {100 * budget.max_drop:g} points" if share else f"a drop of at most {budget.max_drop:g}"
        )
    if budget.max_latency is not None:
        limits.append(f"at most {seconds(budget.max_latency)}")
    if budget.min_speedup is not None:
        limits.append(f"at least {budget.min_speedup:g}x faster")
    if budget.max_size is not None:
        limits.append(f"at most {byte_count(budget.max_size)}")
    if budget.max_size_share is not None:
        limits.append(f"at most {budget.max_size_share:.0%} of the size")
    if budget.max_memory is not None:
        limits.append(f"at most {byte_count(budget.max_memory)} of memory")
    if budget.max_memory_share is not None:
        limits.append(f"at most {budget.max_memory_share:.0%} of the memory")
    return ", ".join(limits)


def check_in_words(check: Check, metric: str) -> str:
    """What a check found, in one line."""
    value, bound = check.value, check.bound
    match check.limit:
        case "max-drop":
            return f"{metric} drops by {value:.4g}, the limit is {bound:.4g}"
        case "max-latency":
            return f"latency is {value * 1e3:.4g} ms, the limit is {bound * 1e3:.4g} ms"
        case "min-speedup":
            return f"speed-up is {value:.3g}x, the limit is {bound:g}x"
        case "max-memory" if math.isnan(value):
            return f"memory is not known on this system, the limit is {bound:,.0f} bytes"
        case _:
            return f"{check.limit.removeprefix('max-')} is {value:,.0f} bytes, the limit is {bound:,.0f}"


def where(environment: Mapping[str, str | int]) -> str:
    """Where figures were measured."""
    threads = environment["threads"]
    own = "ONNX Runtime's own number of threads" if threads == 0 else f"{threads} thread{'s' * (threads != 1)}"
    provider = str(environment["provider"]).removesuffix("ExecutionProvider").lower()
    return f"ONNX Runtime {environment['onnxruntime']} on {provider}, {own}, batch {environment['batch']}"


def grouped(pairs: Sequence[tuple[str, str]]) -> list[tuple[str, list[str]]]:
    """(node, text) pairs by text, the most frequent first; texts that are `alike` count as one."""
    groups: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for node, text in pairs:
        groups[alike(text)].append((node, text))
    ordered = sorted(groups.values(), key=lambda items: -len(items))
    return [(in_common([text for _, text in items]), [node for node, _ in items]) for items in ordered]


def alike(text: str) -> str:
    """A text in which all that is quoted reads alike, and so do all fractions."""
    return _FRACTION.sub("0.0", _QUOTED.sub("'...'", text))


def in_common(texts: Sequence[str]) -> str:
    """What texts that are `alike` say together: no names where they differ, of fractions the least and the most."""
    if len(set(texts)) == 1:
        return texts[0]
    nameless = [_QUOTED.sub("'...'", text) for text in texts]
    numbers = [sorted(set(found), key=float) for found in zip(*map(_FRACTION.findall, nameless), strict=True)]
    ranges = iter([found[0] if len(found) == 1 else f"{found[0]} to {found[-1]}" for found in numbers])
    return _FRACTION.sub(lambda _: next(ranges), nameless[0])
