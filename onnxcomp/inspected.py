"""What `inspect` shows of a model: its nodes, groups of channels, weights, options and times."""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import groupby, takewhile

from rich.console import RenderableType

from onnxcomp.report import FrozenRow, GroupRow, Inspection, LatencyTable, OptionRow, WeightRow
from onnxcomp.tables import columns, heading, line, notes, some
from onnxcomp.wording import byte_count, count, grouped, seconds, where


def inspection(model: Inspection, verbose: bool) -> Iterator[RenderableType]:
    """All of it, one table below the other; verbose with every node, and all names of a group."""
    total = sum(node.microseconds or 0 for node in model.nodes)
    shown = [node for node in model.nodes if verbose or node.parameters or node.flops or node.microseconds]

    def share(microseconds: float | None) -> str:
        return "-" if microseconds is None else f"{microseconds / total:.1%}"

    rows = [
        (
            node.name,
            node.op,
            "?" if node.shape is None else "x".join(map(str, node.shape)) or "scalar",
            count(node.parameters),
            byte_count(node.bytes),
            "?" if node.flops is None else count(node.flops),
            share(node.microseconds),
            *([node.note] if verbose else []),
        )
        for node in shown
    ]
    yield line(f"{model.source}: opset {model.opset}, {byte_count(model.size)}", "bold")
    yield line(f"inputs   {', '.join(model.inputs) or 'none'}")
    yield line(f"outputs  {', '.join(model.outputs) or 'none'}")
    yield line()
    yield columns(
        ["node", "op", "output", "parameters", "bytes", "FLOPs", "time", *(["note"] if verbose else [])], rows
    )
    yield line()
    if hidden := len(model.nodes) - len(shown):
        yield line(f"and {hidden} nodes that store, compute and take nothing (-v shows them)", "dim")
    sums = f"{count(model.parameters)} parameters in {byte_count(model.bytes)}, {count(model.flops)} FLOPs per run"
    yield line(f"In all {len(model.nodes)} nodes, {sums}", "bold")
    if model.protocol:
        yield line(f"Time: {model.protocol}; - was fused into a neighbour; {where(model.environment)}", "dim")
    if model.groups:
        yield from _groups(model.groups, verbose)
    if model.frozen:
        yield from _frozen(model.frozen, verbose)
    if model.weights:
        yield from _weights(model.weights)
    if model.options:
        yield from _options(model.options)
    if model.latency is not None:
        yield from _latency(model.latency)
    yield from notes(model.notes)


def _latency(table: LatencyTable) -> Iterator[RenderableType]:
    """The latency table."""

    def micros(value: float | None) -> str:
        return "-" if value is None else "fused" if value == 0 else seconds(value * 1e-6)

    def shape(sizes: Sequence[int] | None) -> str:
        return "-" if sizes is None else "x".join(map(str, sizes)) or "scalar"

    forms = list(table.layouts)
    yield from heading("What chains of nodes take")
    rows = [
        (
            row.operators,
            row.first,
            f"{row.count}",
            shape(row.input),
            shape(row.weight),
            *tuple(micros(row.microseconds.get(form)) for form in forms),
        )
        for row in table.chains
    ]
    rows.append(("changes of layout", "", "", "", "", *(micros(table.layouts[form]) for form in forms)))
    yield columns(["op", "node", "times", "input", "weight", *forms], rows)
    if table.widths:
        yield from heading("What is left of the time with fewer channels")
        yield columns(
            ["node", "times", "channels", "left", *forms],
            [
                (
                    row.group,
                    f"{row.count}",
                    f"{row.size}",
                    f"{row.width}",
                    *tuple(f"{row.shares[form]:.0%}" for form in forms),
                )
                for row in table.widths
            ],
        )
    if table.crossings:
        yield from heading("Into integers and out of them")
        yield columns(
            ["elements", "QuantizeLinear", "DequantizeLinear"],
            [(f"{row.elements:,}", micros(row.quantize), micros(row.dequantize)) for row in table.crossings],
        )


def _weights(rows: Sequence[WeightRow]) -> Iterator[RenderableType]:
    yield from heading("What weights bear")
    headings = ["layer", "weight", "rank", "90% by", "99% by", "1 bit", "2", "3", "4", "8", "bears"]
    yield columns(
        headings,
        [
            (
                row.name,
                "x".join(map(str, row.shape)),
                str(row.outputs) if row.spectrum else "-",
                str(row.rank_90) if row.spectrum else "-",
                str(row.rank_99) if row.spectrum else "-",
                *(f"{row.errors[bits - 1]:.2%}" for bits in (1, 2, 3, 4, 8)),
                f"{row.bits} bits" if row.bits else "-",
            )
            for row in rows
        ],
    )
    yield line()
    yield line("90%, 99% by: the rank that keeps so much of the output's energy. 1 bit, ...: what a codebook", "dim")
    yield line("loses of it, by k-means alone. Bears: the fewest bits that lose no more than 1%.", "dim")


def _options(rows: Sequence[OptionRow]) -> Iterator[RenderableType]:
    for technique, own in groupby(rows, key=lambda row: row.technique):
        yield from heading(f"What {technique} could do")
        table = []
        for part, options in groupby(own, key=lambda row: row.part):
            for number, option in enumerate(options):
                setting = f"{option.setting:g}" if isinstance(option.setting, float) else str(option.setting)
                time = f"{option.latency:.2f}x"
                table.append(("" if number else part, setting, f"{option.error:.2%}", byte_count(option.bytes), time))
        yield columns(["part", "setting", "error", "bytes", "time"], table)
    yield line()
    yield line(
        "Error: squared, of what the part gives, relative to its energy, by one Gram matrix of its inputs.", "dim"
    )
    yield line("Bytes: of its weights then. Time: of the part by itself, relative to what it takes now.", "dim")


def _groups(groups: Sequence[GroupRow], verbose: bool) -> Iterator[RenderableType]:
    yield from heading("Channels that only go together")
    headings = ["group", "channels", "made by", "read by", "tensors", "crossing"]
    yield columns(headings, [_group(group, verbose) for group in groups])
    yield line()
    yield line("Channels: 4 x 16 are 4, each 16 places wide, as heads are. Read by: - is no layer, and prune", "dim")
    yield line("leaves these. Crossing: what computes over all of them, so that each changes the others.", "dim")


def _group(group: GroupRow, verbose: bool) -> tuple[str, ...]:
    """A row of the table; the folders that the names of its layers share become `...`, unless verbose."""
    levels = zip(*(name.split("/")[:-1] for name in (*group.made_by, *group.read_by)), strict=False)
    shared = "".join(f"{level[0]}/" for level in takewhile(lambda level: len(set(level)) == 1, levels))

    def layers(names: Sequence[str]) -> str:
        short = [f".../{name.removeprefix(shared)}" for name in names] if shared.strip("/") else names
        text = ", ".join(names) if verbose else some(short)
        return text if len(names) == 1 else f"{len(names)}: {text}" if names else "-"

    kinds = Counter(crossing.partition(" ")[0] for crossing in group.crossing)
    return (
        group.name,
        str(group.size) if group.width == 1 else f"{group.size} x {group.width}",
        layers(group.made_by),
        layers(group.read_by),
        str(group.tensors),
        ", ".join(group.crossing if verbose else (f"{number} {kind}" for kind, number in kinds.items())),
    )


def _frozen(frozen: Sequence[FrozenRow], verbose: bool) -> Iterator[RenderableType]:
    yield from heading("Layers whose channels cannot go")
    if verbose:
        yield columns(["layer", "reason"], [(row.name, row.reason) for row in frozen])
        return
    for reason, names in grouped([(row.name, row.reason) for row in frozen]):
        yield line(f"{len(names):>4} x {reason} ({some(names)})")
