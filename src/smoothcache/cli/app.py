"""The ``smoothcache`` command: each command reads its options, calls the library, shows the result.

Results go to stdout; progress, warnings and errors to stderr. With ``--json`` nothing but one JSON
document goes to stdout. Bad input ends in one line and exit code 2, Ctrl-C in exit code 130.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from typing import Annotated, Any

import typer.core

from ..errors import SmoothCacheError, SmoothCacheWarning
from ..version import __version__
from .outputs import GIVEN, one_line, show_warning, to_stderr

_BAD_INPUT, _INTERRUPTED = 2, 130


class _OneLineErrors(typer.core.TyperGroup):
    """Ends in one line on stderr for everything that the user can put right."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # those of the packages below us
            warnings.simplefilter("always", SmoothCacheWarning)
            warnings.showwarning = show_warning
            GIVEN.set(tuple(sys.argv[1:] if args is None else args))
            try:
                code = super().main(
                    args, prog_name, complete_var, False, windows_expand_args, **extra
                )
            except (KeyboardInterrupt, typer.Abort):
                code = _INTERRUPTED
            except (SmoothCacheError, OSError) as error:
                to_stderr(f"error: {one_line(error)}")
                code = _BAD_INPUT
            except Exception as error:
                if not hasattr(error, "format_message"):  # not one of the option parser's
                    raise
                to_stderr(f"error: {one_line(error.format_message())}")
                code = _BAD_INPUT
        if code == _INTERRUPTED:
            to_stderr("interrupted")
        if standalone_mode:
            sys.exit(code if isinstance(code, int) else 0)
        return code


app = typer.Typer(
    cls=_OneLineErrors,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def main(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
) -> None:
    """Faster sampling from diffusion transformers, without training.

    The way to a faster pipeline: [bold]calibrate[/bold] measures what reusing each layer costs,
    [bold]plan[/bold] decides what to reuse, [bold]generate[/bold] and [bold]compare[/bold] run it.
    """
    if version:
        typer.echo(__version__)
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())
