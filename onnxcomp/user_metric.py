"""The user's own metric: a function in a Python file, imported only when it is asked for."""

import difflib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Self, SupportsFloat, cast

import numpy as np

from onnxcomp.errors import OptionError


@dataclass(frozen=True)
class UserFunction:
    """`evaluate(predict) -> float`, where `predict(feeds: dict) -> dict` runs a model.

    Attributes:
        text: what the user wrote, `FILE.py:FUNCTION`.
        file: where it was defined.
        function: the function itself.
    """

    text: str
    file: Path
    function: Callable[[Any], object]

    @classmethod
    def load(cls, text: str, file: Path, name: str) -> Self:
        """Import the file.

        Raises:
            OptionError: no such file or function, or the file does not import.
        """
        if not file.is_file():
            raise OptionError(f"no such file: '{file}'", f"--metric {text} names it", "check the path")
        function = getattr(module := _imported(file), name, None)
        if not callable(function):
            own = [key for key, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__]
            near = difflib.get_close_matches(name, own, n=1)
            raise OptionError(
                f"'{file}' has no function '{name}'",
                f"did you mean '{near[0]}'?" if near else "",
                f"def {name}(predict) -> float: ...",
            )
        return cls(text, file, function)

    @classmethod
    def of(cls, function: Callable[[Any], object]) -> Self:
        """A function that Python code gave."""
        name = getattr(function, "__qualname__", type(function).__name__)
        return cls(name, Path(inspect.getsourcefile(inspect.unwrap(function)) or name), function)

    @property
    def higher_is_better(self) -> bool:
        """True unless the function says otherwise by an attribute: `evaluate.higher_is_better = False`."""
        return bool(getattr(self.function, "higher_is_better", True))

    def __call__(self, predict: Callable[[Any], Any]) -> float:
        """Run it.

        Raises:
            OptionError: it raised, or did not return a number.
        """
        try:
            result = self.function(predict)
        except (Exception, SystemExit) as error:
            raise _user_error(f"metric '{self.text}' raised {type(error).__name__}", self.file, error) from error
        if not isinstance(result, SupportsFloat) or np.ndim(cast(float, result)):
            raise OptionError(
                f"metric '{self.text}' returned {type(result).__name__}, not a number",
                "the function has no return statement, or returns several values",
                "return one float",
            )
        value = float(result)
        if np.isnan(value):
            raise OptionError(
                f"metric '{self.text}' returned NaN",
                "the model's outputs are NaN or constant, or the metric divides zero by zero",
                "check the outputs with `onnxcomp eval --metric relative-error`",
            )
        return value


def _imported(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"onnxcomp_user_metric_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise OptionError(f"'{file}' cannot be imported", "it is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module  # where dataclasses and pickle look
    folder = str(file.resolve().parent)  # its neighbours import as they do when it runs as a script
    sys.path.insert(0, folder)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise _user_error(f"'{file}' does not import: {type(error).__name__}", file, error) from error
    finally:
        sys.path.remove(folder)
    return module


def _user_error(fact: str, file: Path, error: BaseException) -> OptionError:
    """Tell an error in the user's file by the line where it happened."""
    message = str(error).splitlines()[0] if str(error) else type(error).__name__
    frames = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).resolve() == file.resolve()]
    if isinstance(error, SyntaxError) and error.filename and Path(error.filename).resolve() == file.resolve():
        where = f"{file}:{error.lineno}: {(error.text or '').strip()}: "
    elif frames:
        where = f"{file}:{frames[-1].lineno}, in {frames[-1].name}: {frames[-1].line}: "
    else:
        where = ""
    return OptionError(fact, f"{where}{message}", "mend that line; the function takes predict(feeds: dict) -> dict")
