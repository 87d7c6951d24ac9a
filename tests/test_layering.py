"""Imports run one way. Each row below may import from the rows above it and, without cycles, from its own."""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "onnxcomp"

# fmt: off
LAYERS = (
    {"errors", "numerics"},
    {"protos", "files", "model", "graph", "layers", "symbolic", "cost", "scoring", "user_metric", "metrics", "budget",
     "samples", "npz", "images", "synthetic", "data"},
    {"machine", "runtime", "executors", "fresh", "footprint", "stopwatch", "profiling", "store",
     "deadline", "padding"},
    {"settings", "core"},
    {"observations", "probe", "calibration", "equivalence", "weights", "decode", "rescale", "integers",
     "constants", "unpacking", "encodings", "compression",
     "relations", "movement", "facts", "channels", "members", "saliency", "surgery", "widths", "timing",
     "effects", "branches", "splitting", "latency", "chains", "prefix", "twins", "units", "storage", "together",
     "reconstruction", "pruning"},
    {"passes"},
    {"registry", "recipe", "record", "explanation", "verification",
     "placement", "kernels", "table", "program", "appraisal", "planning", "sensitivity", "judges", "report",
     "candidates", "drafts", "plans", "search", "tradeoffs", "family",
     "optimizer", "measure", "inspection", "tolerance", "conversion", "techniques", "package",
     "wording", "anatomy", "invocation", "plots", "page"},
    {"tables", "inspected", "console", "options", "shell", "viewing", "cli", "__main__", "__init__"},
)
# fmt: on
"""Lowest first: arrays, models and data, execution, the contract, tools of passes, passes, flows, commands."""

RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}


def sources() -> dict[str, Path]:
    """Every module of the package by its dotted name below it, passes included."""
    files = [*ROOT.rglob("*.py"), *(ROOT / "passes").glob("*.py")]  # rglob follows no links
    return {".".join(file.relative_to(ROOT).with_suffix("").parts): file for file in files}


SOURCES = sources()


def imported(name: str) -> Iterator[str]:
    """Dotted names of all that a module imports, wherever in it."""
    for node in ast.walk(ast.parse(SOURCES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} imports relatively; spell the module out"
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def internal(name: str) -> set[str]:
    """The package's own modules among them."""
    found = {other.removeprefix("onnxcomp.") for other in imported(name) if other.startswith("onnxcomp.")}
    return (found & SOURCES.keys()) | (found & {"passes"})


def top(name: str) -> str:
    return name.split(".")[0]


def test_every_module_has_its_row_and_every_row_its_modules() -> None:
    assert {top(name) for name in SOURCES} == RANK.keys(), "add the module to LAYERS, or remove it from there"


@pytest.mark.parametrize("name", SOURCES)
def test_imports_run_one_way(name: str) -> None:
    above = {other for other in internal(name) if RANK[top(other)] > RANK[top(name)]}
    assert not above, f"{name} imports {sorted(above)} from a higher row"


def test_there_are_no_cycles() -> None:
    list(TopologicalSorter({name: internal(name) for name in SOURCES}).static_order())  # raises CycleError


def test_passes_know_nothing_of_each_other() -> None:
    for name in SOURCES:
        if top(name) == "passes":
            others = {other for other in internal(name) if top(other) == "passes"}
            assert not others, f"{name} imports {sorted(others)}: what passes share belongs into the engine"


def test_only_one_module_opens_the_door_to_the_runtime() -> None:
    users = {name for name in SOURCES if any(top(other) == "onnxruntime" for other in imported(name))}
    assert users == {"runtime"}


def test_numerics_know_arrays_only() -> None:
    for name in SOURCES:
        if top(name) == "numerics":
            assert {top(other) for other in imported(name)}.isdisjoint({"onnx", "onnx_ir", "onnxscript", "onnxruntime"})
            assert {top(other) for other in internal(name)} <= {"errors", "numerics"}
