"""What gives way, and what is worth a choice."""

import math

from onnxcomp.budget import Budget
from onnxcomp.report import Figures, Trial
from onnxcomp.tradeoffs import giving_way, undominated

ORIGINAL = Figures(1000, 4e-3, speedup=1.0, drop=0.0, memory=5000)


def trial(name: str, size: int, speedup: float, drop: float, memory: int | None = None) -> Trial:
    return Trial(name, Figures(size, 4e-3 / speedup, speedup=speedup, drop=drop, memory=memory), "")


def test_each_limit_says_by_how_much_it_would_have_to_give_way() -> None:
    trials = [
        trial("slow", 250, 1.5, 0.0), trial("fast", 300, 2.5, 0.03), trial("faster", 300, 3.0, 0.06),
        trial("medium", 350, 1.8, 0.01),
    ]  # fmt: skip
    said = list(giving_way(Budget(max_drop=0.01, min_speedup=2.0, max_size_share=0.4), ORIGINAL, trials, "accuracy"))
    assert said == [
        "All else holds if --min-speedup gives way by 0.20x: speed-up is 1.8x, the limit is 2x ('medium').",
        "All else holds if --max-drop gives way by 0.02: accuracy drops by 0.03, the limit is 0.01 ('fast').",
    ]


def test_latency_size_and_memory_give_way_in_their_units() -> None:
    budget = Budget(max_drop=0.01, max_latency=1e-3, max_size=200, max_memory_share=0.5)
    trials = [
        trial("a", 100, 1.0, 0.0, 2000), trial("b", 300, 5.0, 0.0, 2000), trial("c", 100, 5.0, 0.0, 4000),
        trial("d", 100, 5.0, 0.5, 1),
    ]  # fmt: skip
    said = "\n".join(giving_way(budget, ORIGINAL, trials, "accuracy"))
    assert "--max-latency gives way by 3 ms" in said
    assert "--max-size gives way by 100 bytes" in said
    assert "--max-memory gives way by 1,500 bytes" in said
    assert "--max-drop gives way by 0.49" in said


def test_where_several_must_give_way_the_nearest_says_which() -> None:
    trials = [trial("far", 900, 1.1, 0.5), trial("near", 500, 1.8, 0.02)]
    (said,) = giving_way(Budget(max_drop=0.01, min_speedup=2.0, max_size=500), ORIGINAL, trials, "accuracy")
    assert said == (
        "No candidate breaks one limit alone. 'near' comes nearest if several give way: --max-drop by 0.01; "
        "--min-speedup by 0.20x."
    )


def test_what_was_not_measured_says_nothing() -> None:
    trials = [Trial("untimed", Figures(10, drop=0.0), ""), trial("broken", 10, 5.0, math.inf)]
    assert not list(giving_way(Budget(max_drop=0.01, min_speedup=2.0), ORIGINAL, trials, "accuracy"))
    small = Trial("small", Figures(10, drop=0.03), "over the budget")  # which nobody times
    (said,) = giving_way(Budget(max_drop=0.01, max_size=100), ORIGINAL, [*trials, small], "accuracy")
    assert (
        said == "All else holds if --max-drop gives way by 0.02: accuracy drops by 0.03, the limit is 0.01 ('small')."
    )
    assert not list(giving_way(Budget(max_drop=0.01), ORIGINAL, [], "accuracy"))


def test_nothing_that_another_beats_in_all_is_worth_a_choice() -> None:
    figures = [
        trial("", size, speedup, drop).figures
        for size, speedup, drop in [(10, 2.0, 0.1), (10, 1.0, 0.1), (5, 1.0, 0.2), (20, 3.0, 0.1), (10, 2.0, 0.1)]
    ]
    assert undominated(figures) == [3, 0, 2]
    assert undominated([Figures(1)]) == []
