"""The command line. `main` turns every PlancError into one message and its exit code.

0 done; 1 differs or a check failed; 2 bad input; 3 infeasible; 4 an external tool failed.
Machine output (`--json`) goes to stdout, progress and messages to stderr.
"""

from __future__ import annotations

import json
import os
import sys
from importlib import import_module

import click

from planc.errors import PlancError
from planc.version import __version__

#: command -> module of planc.commands that defines it; the order is that of `planc --help`.
COMMANDS = {
    "compile": "compile",
    "inspect": "inspect",
    "diff": "diff",
    "explain": "explain",
    "estimate": "estimate",
    "validate": "validate",
    "calibrate": "calibrate",
    "replay": "replay",
    "verify": "verify",
    "run": "run",
    "export": "export",
    "hardware": "catalogue",
    "models": "catalogue",
    "engines": "catalogue",
}


class LazyGroup(click.Group):
    """Imports a command's module only when that command is named (or help is asked for)."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        module = import_module(f"planc.commands.{COMMANDS[name]}")
        command: click.Command = getattr(module, f"{name}_command")
        return command


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="planc")
def cli() -> None:
    """planc compiles a model to a serving plan."""


def main() -> None:
    """Entry point of the `planc` script."""
    # transformers' own bars and advice are not planc's to print; a user's setting wins
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        code = cli.main(standalone_mode=False)  # the code of click's Exit, or None
        sys.exit(code if isinstance(code, int) else 0)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted; nothing was written", err=True)
        sys.exit(130)
    except PlancError as error:
        report(error)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)


def report(error: PlancError) -> None:
    """One message on stderr; with --json also `{"error": {...}}` on stdout."""
    if "--json" in sys.argv:
        body = {
            "type": type(error).__name__,
            "message": str(error),
            "exit_code": error.exit_code,
            "fields": {key: str(value) for key, value in error.fields.items()},
        }
        click.echo(json.dumps({"error": body}, indent=2, sort_keys=True))
    click.secho("error: ", fg="red", bold=True, nl=False, err=True)
    click.echo(str(error), err=True)


if __name__ == "__main__":
    main()
