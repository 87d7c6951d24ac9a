"""The latency table, on made-up times."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jsonschema
import onnx_ir as ir
import pytest
from rich.console import Console

from models import zoo
from onnxcomp import inspection, latency, placement, table
from onnxcomp import model as models
from onnxcomp.channels import channel_groups
from onnxcomp.inspection import inspect
from onnxcomp.placement import Crossing
from onnxcomp.profiling import Profile
from onnxcomp.runtime import Target
from onnxcomp.table import worth_timing
from tests.commands import mlp, run
from tests.passes.test_prune_depth import residual
from tests.planned import STRENGTHS, made_up
from tests.test_report import SCHEMA


@pytest.fixture(autouse=True)
def profiled(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many models were profiled each time."""
    counts: list[int] = []

    def profiles(models: Sequence[ir.Model], *_: Any, **__: Any) -> list[Profile]:
        counts.append(len(models))
        return made_up(models)

    for module in (table, latency, inspection):
        monkeypatch.setattr(module, "profiles", profiles)
    monkeypatch.setattr(placement, "measure_crossing", lambda *_: Crossing((10, 100), (1.0, 2.0), (3.0, 4.0)))
    return counts


def test_chains_of_one_kind_are_one_entry() -> None:
    model = residual(*STRENGTHS)
    found = inspect(model, latency=True, target=Target(threads=1), batch=2)
    assert found.latency is not None
    chains = found.latency.chains
    convolutions = [row for row in chains if row.operators.startswith("Conv")]
    assert sum(row.count for row in convolutions) == sum(node.op_type == "Conv" for node in model.graph)
    assert len(convolutions) < sum(node.op_type == "Conv" for node in model.graph)
    for row in convolutions:
        assert row.microseconds["static INT8"] == pytest.approx(row.microseconds["float"] / 3)
        assert row.input is not None
        assert row.input[0] == 2
    assert [row.elements for row in found.latency.crossings] == [10, 100]
    jsonschema.validate(json.loads(json.dumps(found.to_json(), allow_nan=False)), SCHEMA)


def test_fewer_channels_take_less_in_every_precision() -> None:
    found = inspect(residual(*STRENGTHS), latency=True, target=Target(threads=1)).latency
    assert found is not None
    assert found.widths
    for row in found.widths:
        assert row.width < row.size
        assert set(row.shares) == set(found.layouts)
        assert 0 < row.shares["static INT8"] < 1


def test_without_being_asked_there_is_none(profiled: list[int]) -> None:
    assert inspect(residual(*STRENGTHS), target=Target(threads=1)).latency is None
    assert profiled == [1]


def test_it_says_how_far_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[int, int, str]] = []
    model = mlp(tmp_path / "m.onnx")
    found = inspect(model, latency=True, target=Target(threads=1), progress=lambda *step: told.append(step))
    assert found.latency is not None
    forms = found.latency.layouts
    widths = [(place, len(forms), f"timing widths in {form}") for place, form in enumerate(forms)]
    assert [step for step in told if step[2].startswith("timing")] == [
        (0, 0, "timing nodes"),
        (0, 0, "timing nodes in each precision"),
        *widths,
    ]
    monkeypatch.setattr(Console, "is_terminal", True)
    assert "timing nodes" in run("inspect", model, "--latency", "--threads", 1).stderr


def test_what_is_known_is_not_timed_again(profiled: list[int], tmp_path: Any) -> None:
    options: dict[str, Any] = {"latency": True, "target": Target(threads=1), "cache": tmp_path}
    first = inspect(residual(*STRENGTHS), **options)
    timed = len(profiled)
    again = inspect(residual(*STRENGTHS), **options)
    assert again.latency == first.latency
    assert len(profiled) - timed <= 2, "the model as it is, and its forms: the store knows all widths"


def test_kernels_work_in_blocks_but_heads_are_blocks_themselves() -> None:
    groups = channel_groups(models.load(zoo.build("bert")))
    heads = next(group for group in groups if group.block > 1)
    wide = next(group for group in groups if group.size > 16)
    assert worth_timing(heads).tolist() == list(range(heads.size - heads.size // 4 + 1))
    assert all((wide.size - worth_timing(wide)) % 4 == 0)
