# SPDX-License-Identifier: Apache-2.0
"""The command ``ckpt-fast``: look at checkpoints, and at what of the library is in use."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from ckpt_fast.cli import info, verify


class _ShowVersions(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        sys.stdout.writelines(f"{line}\n" for line in info.versions())
        parser.exit()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0 if all is well, 1 if not, 2 for wrong usage."""
    parser = argparse.ArgumentParser(prog="ckpt-fast", description=__doc__)
    parser.add_argument("--version", action=_ShowVersions, nargs=0, help="show what is installed, and exit")
    commands = parser.add_subparsers(dest="command", required=True)
    for command in (info, verify):
        command.add_parser(commands)
    options = parser.parse_args(arguments)
    status: int = options.run(options)
    return status


if __name__ == "__main__":
    sys.exit(main())
