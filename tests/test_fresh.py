"""Work in processes of their own."""

import os
import subprocess
import sys

import numpy as np
import pytest

from onnxcomp import model as models
from onnxcomp.errors import OnnxcompError
from onnxcomp.fresh import files_of, fresh
from onnxcomp.profiling import profiles
from onnxcomp.runtime import Protocol, Target
from onnxcomp.stopwatch import time_apart
from tests.lab import network, samples

FEEDS = {"x": samples(4)["x"]}


def test_it_is_another_process() -> None:
    assert fresh(os.getpid) != os.getpid()


def test_what_is_printed_meanwhile_does_not_mix_with_the_answer() -> None:
    assert fresh(os.system, "echo hello") == 0


def test_a_failure_there_is_an_error_here() -> None:
    with pytest.raises(OnnxcompError, match="fresh process failed") as found:
        fresh(os.listdir, "/nowhere")
    assert "nowhere" in str(found.value)


@pytest.mark.parametrize("module", ["stopwatch", "profiling"])
def test_what_is_timed_there_waits_for_no_import_that_it_does_not_need(module: str) -> None:
    code = f"import sys, onnxcomp.fresh, onnxcomp.{module}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "onnxruntime" in done.stdout.split()
    assert {"onnx", "onnx_ir", "scipy"}.isdisjoint(done.stdout.split())


def test_models_lie_there_while_they_are_needed() -> None:
    with files_of([network(), network(seed=1)]) as paths:
        assert [models.to_bytes(models.load(path)) for path in paths]
        folder = paths[0].parent
    assert not folder.exists()


def test_models_are_timed_side_by_side() -> None:
    timings = time_apart([network(), network()], Target(threads=1), FEEDS, Protocol(block=1, rounds=3, warmup=1))
    assert len(timings) == 2
    assert timings[0].speedup == 1
    assert all(timing.low <= timing.median <= timing.high for timing in timings)


def test_profiles_name_the_nodes() -> None:
    (profile,) = profiles([network()], Target(threads=1), FEEDS, rounds=1)
    assert profile.times.keys() >= {"g0", "g5"}
    assert np.isfinite(list(profile.times.values())).all()
