# SPDX-License-Identifier: Apache-2.0
"""``ckpt-fast doctor [DIR]``: what is slow here, and how to mend it."""

from __future__ import annotations

import itertools

import click

from ckpt_fast.cli import output
from ckpt_fast.tools.doctor import Finding, examine

_STYLES = {"ok": "green", "note": "yellow", "slow": "bold yellow", "broken": "bold red"}


@click.command()
@click.argument("directory", required=False)
@output.json_option
@output.exit_status
def doctor(directory: str | None, as_json: bool) -> int:
    """Look at software, engine and machine and, with DIRECTORY, at the storage there.

    Says what makes saves and loads slow, and how to mend it. Exit status: 0, or 1 if something cannot work.
    """
    found = examine(directory)
    if as_json:
        output.print_json(found)
    else:
        for section, group in itertools.groupby(found, lambda each: each.section):
            output.line(section, "bold")
            for each in group:
                _print(each)
    return output.DAMAGED if any(each.level == "broken" for each in found) else output.DONE


def _print(each: Finding) -> None:
    mark = "" if each.level == "ok" else f" [{each.level}]"
    output.line(f"  {each.name + ':':<24}{each.value}{mark}", "" if not mark else _STYLES[each.level])
    if each.remedy:
        output.line(f"  {'':<24}{each.remedy}")
