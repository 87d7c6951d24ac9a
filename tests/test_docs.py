"""What the documentation shows is true: its example runs, and its links lead somewhere."""

import importlib.util
import json
import re
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import yaml

from models import zoo
from onnxcomp import model as models
from onnxcomp.core import Context, Pass
from onnxcomp.layers import layers
from onnxcomp.recipe import Recipe
from onnxcomp.runtime import Session

ROOT = Path(__file__).parents[1]
PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "models/README.md"]


@pytest.fixture(scope="module")
def drop_small(tmp_path_factory: pytest.TempPathFactory) -> type[Pass]:
    """The pass that `docs/passes.md` shows, as a module."""
    (source,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/passes.md").read_text(), re.DOTALL)
    path = tmp_path_factory.mktemp("example") / "drop_small.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location("drop_small", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found: type[Pass] = module.DropSmall
    return found


def test_the_example_does_what_it_says(drop_small: type[Pass]) -> None:
    model = models.load(zoo.build("resnet"))
    before = models.to_bytes(model)
    outcome = drop_small(share=0.3)(model, Context())  # type: ignore[call-arg]
    assert models.to_bytes(model) == before
    assert len(outcome.changes) == len(list(layers(model)))
    for layer in layers(outcome.model):
        assert np.mean(layer.matrix() == 0) == pytest.approx(0.3, abs=0.01)
    assert np.isfinite(Session(outcome.model).run(zoo.feeds(zoo.build("resnet")))["logits"]).all()


def test_the_example_leaves_excluded_nodes_alone(drop_small: type[Pass]) -> None:
    model = models.load(zoo.build("resnet"))
    outcome = drop_small()(model, Context(exclude=re.compile("")))
    assert outcome.model is model
    assert {skip.reason for skip in outcome.skips} == {"excluded by the user"}


def test_the_recipe_that_is_shown_is_one() -> None:
    (text,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs/recipes.md").read_text(), re.DOTALL)
    recipe = Recipe.from_yaml(text)
    assert [technique.name for technique in recipe.passes] == ["simplify", "prune", "quantize-static", "share"]
    assert recipe.exclude == "lm_head"
    schema = json.loads((ROOT / "docs/recipe.schema.json").read_text())
    jsonschema.validate(yaml.safe_load(text), schema)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_to_files(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text())
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not missing
