"""A search that ends in time."""

import time

import pytest

from onnxcomp.budget import Budget
from onnxcomp.core import no_progress
from onnxcomp.deadline import Deadline, TimeIsUp
from tests.lab import Lab, integers, lab, trial

__all__ = ["lab"]


def test_it_only_stops_what_is_inside() -> None:
    deadline = Deadline(0.0)
    tell = deadline.watching(no_progress)
    tell(0, 0, "before")
    with deadline:
        tell(0, 0, "inside")
        raise AssertionError
    assert deadline.passed
    tell(0, 0, "after")


def test_without_a_limit_nothing_stops() -> None:
    deadline = Deadline()
    with deadline:
        deadline.watching(no_progress)(0, 0, "x")
    assert not deadline.passed


def test_what_must_follow_gets_its_time() -> None:
    deadline = Deadline(1000.0)
    tell = deadline.watching(no_progress)
    with deadline:
        tell(0, 0, "early")
        deadline.reserve = 2000.0
        tell(0, 0, "late")
    assert deadline.passed


def test_other_errors_go_on() -> None:
    with pytest.raises(ValueError, match="x"), Deadline(0.0):
        raise ValueError("x")


def test_no_time_at_all_gives_the_clean_model(lab: Lab) -> None:
    result = lab.optimize(time_limit=0.0)
    assert not integers(result.model)
    assert result.report.met
    assert any("time limit" in note for note in result.report.notes)


def test_the_best_so_far_is_the_result(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """The time is over after the first draft was refined."""
    seen: list[str] = []

    def progress(done: int, total: int, what: str) -> None:
        seen.append(what)
        if "remaining weights" in what:
            raise TimeIsUp

    result = lab.optimize(progress=progress)
    assert integers(result.model)
    assert any("time limit" in note for note in result.report.notes)
    assert trial(result, "static INT8").verdict == "chosen"
    assert seen


@pytest.mark.parametrize("fails", [False, True])
def test_what_was_timed_and_could_not_be_judged_is_judged_by_the_final_data(lab: Lab, fails: bool) -> None:
    def progress(done: int, total: int, what: str) -> None:
        if what.startswith("judging: static"):
            raise TimeIsUp

    lab.final_loss = lambda model: float(fails and bool(integers(model)))
    result = lab.optimize(progress=progress, budget=Budget(max_drop=0.5))
    report = result.report
    assert trial(result, "static INT8").verdict == ("over the budget on the final data" if fails else "chosen")
    assert report.met
    assert not any("No quantization" in note or "can be quantized" in note for note in report.notes)


def test_time_passes_within_long_work(lab: Lab) -> None:
    start = time.monotonic()
    lab.optimize(time_limit=0.2, budget=Budget(max_drop=0.5))
    assert time.monotonic() - start < 60
