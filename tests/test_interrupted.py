"""Killed at any moment and started again: the same bytes, and nothing broken in between."""

import os
import random
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

import onnxcomp
from tests.commands import child, mlp, samples

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
