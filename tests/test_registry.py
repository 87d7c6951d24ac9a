import sys
from pathlib import Path

import pytest

import onnxcomp.passes
from onnxcomp.core import Pass
from onnxcomp.errors import OptionError
from onnxcomp.registry import GROUPS, passes, resolve


def test_every_file_gives_its_pass_under_its_own_name() -> None:
    files = {file.stem for file in Path(onnxcomp.passes.__path__[0]).glob("*.py")} - {"__init__"}
    assert {name.replace("-", "_") for name in passes()} == files
    assert list(passes()) == sorted(passes())
    assert all(issubclass(kind, Pass) and kind.name == name and kind.summary for name, kind in passes().items())


def test_groups_stand_for_passes_that_exist() -> None:
    for group, members in GROUPS.items():
        assert group not in passes()
        assert resolve([group]) == frozenset(members)


def test_names_and_groups_mix() -> None:
    assert resolve(["simplify", "quantize"]) == {"simplify", *GROUPS["quantize"]}
    assert resolve([]) == frozenset()


def test_unknown_names_are_refused_with_the_nearest() -> None:
    with pytest.raises(OptionError, match=r"no pass 'simplfy'(?s:.*)did you mean 'simplify'(?s:.*)quantize-static"):
        resolve(["quantize", "simplfy"])
    with pytest.raises(OptionError) as caught:
        resolve(["zzz"])
    assert caught.value.cause == ""


@pytest.mark.parametrize("kind", passes().values(), ids=passes())
def test_the_repr_of_a_pass_is_python_that_gives_it(kind: type[Pass]) -> None:
    technique = kind()
    assert eval(repr(technique), dict(vars(sys.modules[kind.__module__]))) == technique
