# SPDX-License-Identifier: Apache-2.0
"""``ckpt-fast convert SRC DST --to FORMAT``: a checkpoint in another format."""

from __future__ import annotations

from typing import get_args

import click

from ckpt_fast.cli import output
from ckpt_fast.tools.convert import convert as write_anew
from ckpt_fast.tools.convert.convert import Target


@click.command()
@click.argument("source")
@click.argument("destination")
@click.option("--to", type=click.Choice(get_args(Target)), required=True, help="The new format.")
@click.option(
    "--optimizer/--no-optimizer",
    default=None,
    help="With the state of the optimizer, or without. Default: with it, except for safetensors.",
)
@output.json_option
@output.exit_status
def convert(source: str, destination: str, to: Target, optimizer: bool | None, as_json: bool) -> int:
    """Write the checkpoint SOURCE anew, in another format, into the directory DESTINATION.

    If it is interrupted, the same command goes on where it was. It takes at most 256 MiB of memory for
    tensors. There is no checkpoint in DESTINATION before the last step.
    """
    with output.progress_bar("converting") as progress:
        weights_only = None if optimizer is None else not optimizer
        found = write_anew(source, destination, to, weights_only=weights_only, progress=progress)
    if as_json:
        output.print_json(found)
        return output.DONE
    output.line(
        f"{found.destination}: {found.tensors} tensors ({output.size(found.nbytes)}) and {found.objects} "
        f"objects in {found.format} format",
        "green",
    )
    if found.left_out:
        output.line(f"left out: {len(found.left_out)} tensors and objects ({_shown(found.left_out)})")
    if found.resumed:
        output.line("went on with what was there of it")
    return output.DONE


def _shown(names: tuple[str, ...], most: int = 4) -> str:
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")
