# SPDX-License-Identifier: Apache-2.0
"""``ckpt-fast verify DIR...``: read checkpoints whole and compare every file with its checksum."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from ckpt_fast.errors import CheckpointError
from ckpt_fast.pipeline.load.verify import find_damage


def add_parser(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser("verify", help="read checkpoints whole and compare every file's checksum")
    parser.add_argument("directories", nargs="+", metavar="DIR", help="iteration directory")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """0 if every checkpoint is whole, else 1."""
    sound = True
    for directory in options.directories:
        try:
            damages = find_damage(directory)
        except CheckpointError as error:
            damages = [str(error)]
        for damage in damages:
            sys.stderr.write(f"{damage}\n")
        sys.stdout.write(f"{directory}: {'damaged' if damages else 'ok'}\n")
        sound = sound and not damages
    return 0 if sound else 1
