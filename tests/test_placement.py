"""The minimum cut against all assignments of small graphs; made-up times throughout."""

import itertools
from collections.abc import Iterator, Mapping

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxcomp.placement import Crossing, measure_crossing, place
from onnxcomp.profiling import Profile, profiles
from onnxcomp.runtime import Target

CROSSING = Crossing((1, 101), (1.0, 11.0), (2.0, 32.0))

Times = Mapping[str, float]


def graph(sources: list[tuple[int, ...]], outputs: set[int]) -> ir.Model:
    """Node i adds up the values numbered in `sources[i]`: 0 is the input, j + 1 the output of node j."""
    values = [ir.val("x", dtype=ir.DataType.FLOAT, shape=ir.Shape([1, 41]))]
    nodes = []
    for number, read in enumerate(sources):
        node = ir.node("Sum", [values[i] for i in read], name=f"n{number}")
        node.outputs[0].name = f"v{number}"
        nodes.append(node)
        values.append(node.outputs[0])
    chosen = [value for i, value in enumerate(values) if i in outputs or (i and not value.uses())]
    return ir.Model(ir.Graph(values[:1], chosen, nodes=nodes, opset_imports={"": 13}), ir_version=8)


def cost(model: ir.Model, inside: frozenset[str], able: set[str], floats: Profile, integers: Times) -> float:
    """What an assignment takes, counted straight from its definition."""
    total = sum(integers[name] if name in inside else floats.times.get(name, 0.0) for name in able)
    for value in [*model.graph.inputs, *(node.outputs[0] for node in model.graph)]:
        producer = value.producer()
        origin = "" if producer is None else producer.name or ""
        readers = {use.node.name or "" for use in value.uses()} | ({""} if value.is_graph_output() else set())
        size = floats.elements.get(origin, 41)
        if origin in inside and readers - inside:
            total += CROSSING.cost(size, to_integers=False)
        if origin not in inside and readers & inside:
            total += CROSSING.cost(size, to_integers=True)
    return total


def subsets(names: set[str]) -> Iterator[frozenset[str]]:
    for size in range(len(names) + 1):
        yield from map(frozenset, itertools.combinations(sorted(names), size))


@st.composite
def problems(draw: st.DrawFn) -> tuple[ir.Model, set[str], Profile, Times]:
    count = draw(st.integers(1, 7))
    sources = [tuple(draw(st.sets(st.integers(0, i), min_size=1, max_size=3))) for i in range(count)]
    names = [f"n{i}" for i in range(count)]
    times = st.integers(0, 60).map(float)
    floats = Profile({n: draw(times) for n in names}, {n: draw(st.integers(1, 400)) for n in names})
    able = draw(st.sets(st.sampled_from(names), min_size=1))
    return graph(sources, draw(st.sets(st.integers(1, count)))), able, floats, {n: draw(times) for n in names}


@settings(max_examples=100, deadline=None)
@given(problems())
def test_no_assignment_is_cheaper(problem: tuple[ir.Model, set[str], Profile, Times]) -> None:
    model, able, floats, integers = problem
    found = place(model, able, floats, Profile(integers, {}), CROSSING)
    assert found <= able
    best = min(cost(model, inside, able, floats, integers) for inside in subsets(able))
    # Capacities are rounded to nanoseconds.
    assert cost(model, found, able, floats, integers) == pytest.approx(best, abs=0.1)


@settings(max_examples=80, deadline=None)
@given(problems(), st.data())
def test_what_runs_as_one_stays_together(
    problem: tuple[ir.Model, set[str], Profile, Times], data: st.DataObject
) -> None:
    model, able, floats, integers = problem
    silent = data.draw(st.sets(st.sampled_from(sorted(able))))
    floats = Profile({name: time for name, time in floats.times.items() if name not in silent}, floats.elements)
    pairs = []
    for node in model.graph:
        uses = list(node.outputs[0].uses())
        if node.name in silent and len(uses) == 1 and not node.outputs[0].is_graph_output():
            pairs.append({node.name, uses[0].node.name})
    pairs = [pair for pair in pairs if pair <= able]
    found = place(model, able, floats, Profile(integers, {}), CROSSING)
    assert all(pair <= found or not pair & found for pair in pairs)
    whole = (inside for inside in subsets(able) if all(pair <= inside or not pair & inside for pair in pairs))
    best = min(cost(model, inside, able, floats, integers) for inside in whole)
    assert cost(model, found, able, floats, integers) == pytest.approx(best, abs=0.1)


def chain(count: int) -> ir.Model:
    return graph([(i,) for i in range(count)], set())


def same(count: int, time: float) -> Profile:
    return Profile({f"n{i}": time for i in range(count)}, {f"n{i}": 11 for i in range(count)})


def test_times_of_slow_models_do_not_overflow() -> None:
    names = [f"n{i}" for i in range(6)]
    seconds = 2e6  # microseconds: six of these are beyond int32 in nanoseconds
    assert place(chain(6), names, same(6, 2 * seconds), same(6, seconds), CROSSING) == set(names)
    assert place(chain(6), names, same(6, seconds), same(6, 2 * seconds), CROSSING) == frozenset()


def test_dearer_crossings_keep_more_in_one_world() -> None:
    floats = Profile({"n0": 30.0, "n1": 10.0, "n2": 30.0}, {f"n{i}": 11 for i in range(3)})
    integers = Profile({"n0": 1.0, "n1": 16.0, "n2": 1.0}, {})
    islands = place(chain(3), floats.times, floats, integers, CROSSING, 0.5)
    assert islands == {"n0", "n2"}
    assert place(chain(3), floats.times, floats, integers, CROSSING, 2.0) == {"n0", "n1", "n2"}
    assert place(chain(3), floats.times, floats, integers, CROSSING, 20.0) == frozenset()


def test_on_a_tie_nodes_stay_in_float() -> None:
    free = Crossing((1,), (0.0,), (0.0,))
    assert place(chain(2), ["n0", "n1"], same(2, 5.0), same(2, 5.0), free) == frozenset()


def test_crossing_is_interpolated_and_grows_beyond_what_was_measured() -> None:
    assert CROSSING.cost(51, to_integers=True) == pytest.approx(6)
    assert CROSSING.cost(1010, to_integers=False) == pytest.approx(320)
    assert CROSSING.cost(0, to_integers=True) == 1.0


def test_measured_crossings_and_profiles_have_every_entry() -> None:
    crossing = measure_crossing(Target(threads=1), runs=1)
    assert len(crossing.sizes) == len(crossing.quantize) == len(crossing.dequantize)
    model = chain(2)
    (profile,) = profiles([model], Target(threads=1), {"x": np.zeros((1, 41), np.float32)}, rounds=1)
    assert profile.elements == dict.fromkeys(profile.times, 41)
    assert set(profile.times) <= {"n0", "n1"}
