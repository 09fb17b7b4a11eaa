"""The command line: one file a command, found by name; heavy imports happen inside the commands."""

from __future__ import annotations

import importlib
import pkgutil
import sys
from typing import Any

import click

import edgeattn
from edgeattn.core.errors import EdgeAttnError, closest


class Commands(click.Group):
    """Every module of this package without a leading underscore is a command of the same name."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names of the command modules."""
        return sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The ``command`` object of a module."""
        if cmd_name not in self.list_commands(ctx):
            return None
        command: click.Command = importlib.import_module(f"edgeattn.cli.{cmd_name}").command
        return command

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        """As click does, with the closest name for a misspelt one."""
        near = closest(args[0], self.list_commands(ctx)) if args and args[0] not in self.list_commands(ctx) else None
        if near:
            ctx.fail(f"No such command {args[0]!r}. Did you mean {near!r}?")
        return super().resolve_command(ctx, args)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(edgeattn.__version__, prog_name="edgeattn")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def cli(debug: bool) -> None:
    """Takes PyTorch models to edge devices, and proves on the way that the numbers still hold.

    Exit codes: 0 held, 1 a check did not hold, 2 usage, 3 a toolchain is missing, 4 conversion failed, 5 device
    unreachable.
    """


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; our own errors are printed in full and end with their exit code."""
    given = sys.argv[1:] if arguments is None else arguments
    # Accepted anywhere on the line: it is added after an error, to the end of what was typed.
    debug = "--debug" in given
    try:
        cli.main(args=[a for a in given if a != "--debug"], prog_name="edgeattn", standalone_mode=False)
    except EdgeAttnError as error:
        from edgeattn.cli._show import show_error

        show_error(error, debug)
        sys.exit(error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("stopped", err=True)
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(141)
    except OSError as error:  # a folder that vanished or cannot be read, wherever it is first met
        from edgeattn.cli._show import show_error
        from edgeattn.core.errors import UsageError

        refused = UsageError("the system refused a file", value=error.filename, why=error.strerror or str(error))
        show_error(refused.with_traceback(error.__traceback__), debug)
        sys.exit(refused.exit_code)
