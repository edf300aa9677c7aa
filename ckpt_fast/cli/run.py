# SPDX-License-Identifier: Apache-2.0
"""``ckpt-fast run``: a training script of one process, with ckpt_fast installed."""

from __future__ import annotations

from collections.abc import Callable

import click


# The arguments are the script's, or read by what runs it.
@click.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="SCRIPT [ARGUMENTS]...")
def run(arguments: tuple[str, ...]) -> Callable[[], None]:
    """Run a training script with ckpt_fast installed.

    The script needs no change. On several ranks: torchrun ... -m ckpt_fast.run SCRIPT.

    \b
    Before the script:
      -m MODULE       run a module instead, as python -m does
      --no-torch-dcp  leave torch DCP as it is
      --no-megatron   leave Megatron-Core as it is, and do not import it
    """
    from ckpt_fast.run import script

    # Not in here: what the script raises is no business of click's.
    return lambda: script.run(arguments, "ckpt-fast run")
