"""The command `explain`: what a model says of itself, layer by layer."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from onnxcomp import model as models
from onnxcomp.errors import ModelError
from onnxcomp.model import ModelSource
from onnxcomp.record import Origin
from onnxcomp.report import Document, Step, Trial, source_name

_WEIGHTED = {"Conv", "ConvTranspose", "Gemm", "MatMul"}


@dataclass(frozen=True)
class LayerRow:
    """One node, by the name that it has or had.

    Attributes:
        name: of the node.
        done: what passes did to it: `pass: what`.
        left: why passes left it: `pass: reason`. Neither is there for a layer that no pass of the recipe treats.
    """

    name: str
    done: tuple[str, ...]
    left: tuple[str, ...]


@dataclass(frozen=True)
class Explanation(Document):
    """What was done to a model, and why not more.

    Attributes:
        source: the model.
        version: of the onnxcomp that made it.
        input: SHA-256 of what it was made from.
        recipe: YAML that does it again.
        layers: in the model's order, those that are gone last.
        trials: what was tried when the recipe was found, without latencies.
        metric: in whose unit the trials' losses are; empty where nothing was tried.
    """

    kind: ClassVar[str] = "explanation"

    source: str
    version: str
    input: str
    recipe: str
    layers: tuple[LayerRow, ...]
    trials: tuple[Trial, ...] = ()
    metric: str = ""


def explain(source: ModelSource) -> Explanation:
    """Read back what was done to a model.

    Args:
        source: a path, bytes, `onnx.ModelProto` or `onnx_ir.Model` that onnxcomp made.

    Raises:
        ModelError: not a model, or one without a record, or with one that is damaged.
    """
    found = Origin.in_model(source)
    if found.record is None:
        raise ModelError(
            f"{source_name(source)} has a recipe, but no record of what it did",
            "the record would have made the model larger than its input",
            f"`onnxcomp apply MODEL --recipe {source_name(source)} --dry-run -v` on its input shows the same",
        )
    nodes = [(node.name or "", node.op_type) for node in models.all_nodes(models.load(source))]
    said = _said(found.record.steps)
    made = tuple(f"{name}_" for name in said)  # what passes make of a node bears its name
    others = (name for name, kind in nodes if kind in _WEIGHTED and name not in said and not name.startswith(made))
    places = {name: place for place, (name, _) in enumerate(nodes)}
    rows = [LayerRow(name, tuple(done), tuple(left)) for name, (done, left) in said.items()]
    rows += [LayerRow(name, (), ()) for name in dict.fromkeys(others)]
    rows.sort(key=lambda row: places.get(row.name, len(places)))
    trials, metric = found.record.trials, found.record.metric
    recipe = found.recipe.to_yaml()
    return Explanation(source_name(source), found.version, found.input, recipe, tuple(rows), trials, metric)


def _said(steps: tuple[Step, ...]) -> dict[str, tuple[list[str], list[str]]]:
    """What the steps did to each node, and why they left it."""
    said: dict[str, tuple[list[str], list[str]]] = {}
    for node, place, text in _deeds(steps):
        texts = said.setdefault(node, ([], []))[place]
        if text not in texts:
            texts.append(text)
    return said


def _deeds(steps: tuple[Step, ...]) -> Iterator[tuple[str, int, str]]:
    for step in steps:
        yield from ((change.node, 0, f"{step.recipe}: {change.what}") for change in step.changes)
        yield from ((skip.node, 1, f"{step.recipe}: {skip.reason}") for skip in step.skips)
