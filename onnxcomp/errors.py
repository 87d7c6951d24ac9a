"""What can go wrong, and the exit code that says so.

OnnxcompError              1  the work itself failed
├── InputError             2  the caller's input cannot be used
│   ├── ModelError            the model file or graph
│   ├── DataError             calibration or evaluation data
│   ├── OptionError           a setting, metric or pass name
│   └── ProviderError         an execution provider that is not there
└── BudgetError            3  no result within the budget
"""

import difflib
from collections.abc import Iterable
from typing import ClassVar


class OnnxcompError(Exception):
    """An error told as fact, likely cause and remedy.

    Args:
        fact: what happened, naming the file, tensor or option.
        cause: the usual reason, or empty.
        remedy: what to do about it, as a command to paste where there is one.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, fact: str, cause: str = "", remedy: str = "") -> None:
        self.fact, self.cause, self.remedy = fact, cause, remedy
        lines = [fact, f"  likely cause: {cause}" if cause else "", f"  remedy: {remedy}" if remedy else ""]
        super().__init__("\n".join(line for line in lines if line))


class InputError(OnnxcompError):
    """The caller's input cannot be used."""

    exit_code = 2


class ModelError(InputError):
    """The model cannot be read, is not valid, or cannot be written."""


class DataError(InputError):
    """Calibration or evaluation data do not fit the model."""


class OptionError(InputError):
    """A setting, metric or pass name is not understood.

    Args:
        fact, cause, remedy: as of every error.
        setting: the setting of a pass that it is about, and what is named within that; empty where it is about none.
    """

    def __init__(self, fact: str, cause: str = "", remedy: str = "", setting: tuple[str, ...] = ()) -> None:
        super().__init__(fact, cause, remedy)
        self.setting = setting

    def at(self, place: str) -> "OptionError":
        """The same with the place in a file that says so, where there is one."""
        return OptionError(f"{place}: {self.fact}" if place else self.fact, self.cause, self.remedy)


class ProviderError(InputError):
    """The execution provider is not available here."""


class BudgetError(OnnxcompError):
    """No result within the budget was found.

    Attributes:
        result: the best effort, an `optimize.Result`, where there is one.
    """

    exit_code = 3
    result: object = None


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The likely cause where a word is none of those known: the nearest of them, or nothing."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"did you mean '{near[0]}'?" if near else ""
