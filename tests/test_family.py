"""Every result that is worth a choice."""

import json
from pathlib import Path

import jsonschema
import pytest

import onnxcomp
from onnxcomp import family
from onnxcomp.budget import Budget
from onnxcomp.errors import ModelError
from onnxcomp.report import Figures
from tests.lab import Lab, integers, lab
from tests.test_report import SCHEMA

__all__ = ["lab"]


@pytest.fixture
def varied(lab: Lab) -> Lab:
    """Each layer in INT8 saves a tenth of the time and costs a hundredth."""
    lab.loss = lambda model: 0.01 * len(integers(model))
    return lab


def test_the_folder_holds_what_is_not_beaten(varied: Lab, tmp_path: Path) -> None:
    result = varied.optimize(budget=Budget(max_drop=0.5), pareto=tmp_path / "all")
    index = json.loads((tmp_path / "all" / "pareto.json").read_text())
    jsonschema.validate(index, SCHEMA)
    files = [member["file"] for member in index["members"]]
    assert sorted(files) == files == sorted(path.name for path in (tmp_path / "all").glob("*.onnx"))
    figures = [(m["figures"]["drop"], m["figures"]["latency"], m["figures"]["size"]) for m in index["members"]]
    assert len(figures) > 2
    for one in figures:
        assert not any(all(a <= b for a, b in zip(other, one, strict=True)) for other in figures if other != one)
    layers = [len(integers(onnxcomp.load(tmp_path / "all" / file))) for file in files]
    assert layers[0] == 6
    assert {3, 4, 5} & set(layers), "some keep nodes in float"
    (chosen,) = [member for member in index["members"] if member["chosen"]]
    assert integers(onnxcomp.load(tmp_path / "all" / chosen["file"])) == integers(result.model)
    assert result.family is not None
    assert result.family.to_json() == index


def test_each_says_what_made_it(varied: Lab, tmp_path: Path) -> None:
    varied.optimize(pareto=tmp_path / "all", budget=Budget(max_drop=0.5))
    for path in (tmp_path / "all").glob("*.onnx"):
        made = onnxcomp.explain(path)
        assert made.recipe


def test_an_earlier_family_is_replaced_and_nothing_else(varied: Lab, tmp_path: Path) -> None:
    folder = tmp_path / "all"
    varied.optimize(pareto=folder, budget=Budget(max_drop=0.5))
    with pytest.raises(ModelError, match="not empty"):
        varied.optimize(pareto=folder)
    (folder / "mine.txt").write_text("x")
    index = json.loads((folder / "pareto.json").read_text())
    index["members"] += [{"file": "77.onnx"}, {"file": "../out.onnx"}]
    (folder / "pareto.json").write_text(json.dumps(index))
    (folder / "77.onnx").write_text("")
    (tmp_path / "out.onnx").write_text("")
    varied.optimize(pareto=folder, overwrite=True, budget=Budget(max_drop=0.5))
    assert (folder / "mine.txt").exists()
    assert (tmp_path / "out.onnx").exists()
    assert not (folder / "77.onnx").exists()


def test_a_dry_run_writes_none(varied: Lab, tmp_path: Path) -> None:
    assert varied.optimize(pareto=tmp_path / "all", dry_run=True).family is not None
    assert not (tmp_path / "all").exists()


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("")
    with pytest.raises(ModelError, match="is no folder"):
        family.check_folder(tmp_path / "f", overwrite=True)
    with pytest.raises(ModelError, match="cannot make"):
        family.write(family.Family("", Figures(1), (), "", "", "", {}), [], tmp_path / "none" / "all")
    with pytest.raises(ModelError, match="does not exist"):
        family.check_folder(tmp_path / "none" / "all", overwrite=True)
