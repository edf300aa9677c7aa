# SPDX-License-Identifier: Apache-2.0
"""The command ``ckpt-fast``: options, one call of the library for each command, and printing."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any

import click

# Command to the module that it is in, and what it does. Modules are imported on use: torch takes seconds.
_COMMANDS = {
    "inspect": ("inspect", "What a checkpoint is, who wrote it, and its tensors."),
    "verify": ("verify", "Are checkpoints what was written?"),
    "diff": ("diff", "Do two checkpoints hold the same?"),
    "ls": ("listing", "The checkpoints in a directory."),
    "prune": ("listing", "Delete old checkpoints, never the selected one."),
    "convert": ("convert", "Write a checkpoint anew in another format."),
    "doctor": ("doctor", "What is slow here, and how to mend it."),
    "top": ("top", "The saves of a run: how long they held it up, GB/s."),
    "bench": ("bench", "What the storage can do, and what checkpoints make of it."),
    "run": ("run", "Run a training script with ckpt_fast installed."),
}


class _Commands(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module = importlib.import_module(f"ckpt_fast.cli.{_COMMANDS[cmd_name][0]}")
        command: click.Command = getattr(module, cmd_name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, what) for name, (_, what) in _COMMANDS.items()])


def _show_versions(context: click.Context, _: click.Parameter, wanted: bool) -> None:
    if not wanted or context.resilient_parsing:
        return
    from ckpt_fast.cli.versions import versions

    for line in versions():
        click.echo(line)
    context.exit()


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version",
    is_flag=True,
    expose_value=False,
    is_eager=True,
    callback=_show_versions,
    help="Show what is installed, and exit.",
)
def _ckpt_fast() -> None:
    """Look at checkpoints of ckpt_fast, Megatron-Core and torch DCP, and at what makes them slow.

    Exit status: 0 done, and sound or equal; 1 damaged or different; 2 wrong use, or something could not be
    read. No command runs code that a checkpoint brings along.
    """


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] != ["run"]:
        # Nothing is compiled here, and what torch would import for that takes seconds.
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    try:
        status: Any = _ckpt_fast.main(given, prog_name="ckpt-fast", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except click.exceptions.Abort:
        sys.stderr.write("ckpt-fast: interrupted\n")
        return 130
    except BrokenPipeError:  # whoever read the output has seen enough
        sys.stderr.close()
        return 0
    if callable(status):
        status = status()
    return int(status or 0)


if __name__ == "__main__":
    sys.exit(main())
