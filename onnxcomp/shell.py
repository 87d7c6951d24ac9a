"""How every command runs: failures become one message and an exit code, and conversions end in a report and a file.

Exit codes: 0 done and budget met, 1 failed, 2 usage or bad input, 3 budget not reachable, 130 interrupted. Heavy
imports wait until a command runs, so that `--help` answers at once.
"""

import atexit
import gc
import logging
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from onnxcomp.errors import BudgetError, OnnxcompError, OptionError

if TYPE_CHECKING:
    from onnxcomp.console import Terminal
    from onnxcomp.report import Result

_INTERRUPTED = 130


class Command(click.Command):
    """A command whose failures are one message and the documented exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run it."""
        atexit.register(gc.freeze)  # the interpreter would look through all objects for garbage as it ends: 0.3 s
        logging.getLogger().addHandler(logging.NullHandler())  # libraries' log records do not go to the terminal
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise  # click's own ways to end
        except KeyboardInterrupt:
            click.echo("Interrupted.", err=True)
            ctx.exit(_INTERRUPTED)
        except OnnxcompError as error:
            click.echo(_safe(f"Error: {error}"), err=True)
            ctx.exit(error.exit_code)
        except OSError as error:
            click.echo(_safe(f"Error: {error}"), err=True)
            ctx.exit(OnnxcompError.exit_code)
        except Exception as error:  # noqa: BLE001  (whatever is left is a defect, and still no reason for a traceback)
            if ctx.params.get("verbose"):
                click.echo(_safe(traceback.format_exc()), err=True)
            message = next(iter(str(error).splitlines()), "")
            click.echo(
                _safe(
                    f"Error: {type(error).__name__}: {message}\n  This is a defect of onnxcomp: please report it with"
                )
                + " the output of -v.",
                err=True,
            )
            ctx.exit(OnnxcompError.exit_code)


def _safe(text: str) -> str:
    from onnxcomp.wording import printable

    return printable(text)


class Group(click.Group):
    """Commands under one name."""

    command_class = Command


def convert(
    work: "Callable[..., Result]",
    model: Path,
    output: Path | None,
    dry_run: bool,
    terminal: "Terminal",
    settings: dict[str, Any],
) -> None:
    """Run a conversion, show its report, and say where the file went."""
    from onnxcomp.console import render, wrote
    from onnxcomp.family import check_apart
    from onnxcomp.report import Result

    if not model.name:
        raise OptionError("no model was named", remedy="give the path of an .onnx file")
    output = output or model.with_name(model.name.removesuffix(".onnx") + ".opt.onnx")
    page, folder = settings.get("report"), settings.get("pareto")
    if terminal.json not in {None, "-"}:
        json = Path(str(terminal.json))
        for path in (output, page):
            if path is not None and json.resolve() == path.resolve():
                raise OptionError(f"two files are both to be '{path}'", remedy="give another name to --json")
        if folder is not None:
            check_apart(folder, [json])
    refusal = None
    try:
        with terminal.progress() as progress:
            result = work(model, output=output, dry_run=dry_run, progress=progress, **settings)
    except BudgetError as error:
        if not isinstance(error.result, Result):
            raise
        result, refusal = error.result, error
    terminal.show(result.report)
    if result.family is not None:
        terminal.print(*render(result.family))
    if refusal is None:
        terminal.print("\nDry run: no model was written." if dry_run else wrote(output))
    terminal.print(*([] if page is None else [wrote(page)]))
    if refusal is not None:
        raise refusal
    if not result.report.met:  # a best effort was written as asked
        raise BudgetError("the budget was not reached: " + "; ".join(result.report.unmet))
