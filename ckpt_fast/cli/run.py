# SPDX-License-Identifier: Apache-2.0
"""``ckpt-fast run``: a training script of one process, with ckpt_fast installed."""

from __future__ import annotations

from collections.abc import Callable

import click


# All arguments are the script's, or read by what runs it.
@click.command(
    context_settings={
        "ignore_unknown_options": True,
        "allow_interspersed_args": False,
        "help_option_names": [],
    }
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def run(arguments: tuple[str, ...]) -> Callable[[], None]:
    """Run a training script with ckpt_fast installed."""
    from ckpt_fast.run import script

    # Not in here: what the script raises is no business of click's.
    return lambda: script.run(arguments, "ckpt-fast run")
