"""Killed at any moment and started again: the same bytes, and nothing broken in between."""

import os
import random
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

import onnxcomp
from onnxcomp import model as models
from onnxcomp.budget import Budget
from onnxcomp.runtime import Session, Target
from onnxcomp.store import Store
from tests.commands import child, mlp, samples
from tests.passes.test_prune_depth import residual

DIGITS = Path(__file__).parents[1] / "models"


def check(command: Sequence[str], output: Path, kills: int, longest: float) -> None:
    """Kill the command that often, after up to `longest` seconds, and run it to its end twice."""
    output.parent.mkdir()
    chance = random.Random(kills)
    killed = 0
    for turn in range(kills):
        process = subprocess.Popen(
            command, env=dict(os.environ, PYTHONHASHSEED=str(turn)), start_new_session=True, stderr=subprocess.PIPE
        )
        try:
            process.wait(chance.uniform(0.5, longest))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            killed += 1
        _, said = process.communicate()
        assert process.returncode in {0, -signal.SIGKILL}, said
        if output.exists():
            onnxcomp.load(output)
    assert killed, "no run took as long as it was given"
    made = []
    for seed in (100, 101):
        subprocess.run(command, env=dict(os.environ, PYTHONHASHSEED=str(seed)), check=True)
        made.append(output.read_bytes())
        assert {path.name for path in output.parent.iterdir()} == {output.name}
    assert made[0] == made[1]


def test_resumed_from_the_cache_it_gives_the_same_bytes(tmp_path: Path) -> None:
    model, data, output = mlp(tmp_path / "m.onnx"), samples(tmp_path / "d.npz", 80), tmp_path / "out" / "o.onnx"
    command = child(
        "optimize", model, "--calib", data, "-o", output, "--effort", "quick", "--threads", 1, "--cache",
        tmp_path / "cache", "--max-drop", "50%", "-q", "--overwrite",
    )  # fmt: skip
    check(command, output, 2, 1.2)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_so_does_a_search_with_plans_after_twenty_kills(tmp_path: Path) -> None:
    output = tmp_path / "out" / "o.onnx"
    command = child(
        "optimize", DIGITS / "digits.onnx", "--calib", DIGITS / "digits_calib.npz", "--eval",
        DIGITS / "digits_eval.npz", "-o", output, "--passes", "simplify,quantize,prune,prune-depth", "--threads", 1,
        "--batch", 16, "--cache", tmp_path / "cache", "--max-drop", "5%", "-q", "--overwrite",
    )  # fmt: skip
    check(command, output, 20, 20.0)


TIMES = {"crossing", "memory", "pace", "profiles", "ratio", "timings", "widths"}
"""What is never the same when it is measured again."""


def test_what_was_lost_from_the_cache_is_the_same_when_it_is_computed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever of it: what a pass gathers must not depend on which others ran before it."""
    known: dict[Path, str] = {}
    path_of = Store._path

    def noted(self: Store, what: str, parts: object) -> Path:
        path = path_of(self, what, parts)
        known[path] = what
        return path

    monkeypatch.setattr(Store, "_path", noted)
    model, random = residual(1, 0.05, 0.5), np.random.default_rng(0)
    images = random.standard_normal((600, 3, 8, 8)).astype(np.float32)
    (scores,) = Session(model).run({"image": images}).values()
    data = {"image": images, "label": np.asarray(scores).argmax(axis=1)}
    made = []
    for share in (1.0, 0.5, 0.5, 0.0):
        for path, what in known.items():
            if what not in TIMES and random.random() >= share:
                path.unlink(missing_ok=True)
        result = onnxcomp.optimize(
            model, calib=data, passes=["simplify", "quantize-static", "prune", "prune-depth"], effort="quick",
            target=Target(threads=1), budget=Budget(max_drop=0.2), cache=tmp_path, best_effort=True,
        )  # fmt: skip
        made.append(models.to_bytes(result.model))
    assert "pass" in known.values()
    assert len(set(made)) == 1
