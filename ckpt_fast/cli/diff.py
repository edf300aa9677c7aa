# SPDX-License-Identifier: Apache-2.0
"""``ckpt-fast diff A B``: do two checkpoints hold the same?"""

from __future__ import annotations

import dataclasses

import click

from ckpt_fast.cli import output
from ckpt_fast.tools.diff import Comparison, Difference, compare


@click.command()
@click.argument("a")
@click.argument("b")
@output.json_option
@output.exit_status
def diff(a: str, b: str, as_json: bool) -> int:
    """Compare two checkpoints: names, shapes, dtypes, every bit of the tensors, objects.

    They may be of different formats, and divided into different shards. The largest difference is given in
    absolute terms, and in relation to the larger magnitude of the two elements. Exit status: 0 equal,
    1 different (or one of them is damaged), 2 one could not be read.
    """
    with output.progress_bar("comparing") as progress:
        found = compare(a, b, progress)
    if as_json:
        output.print_json({**dataclasses.asdict(found), "equal": found.is_equal})
    else:
        _print(found)
    return output.DONE if found.is_equal else output.DAMAGED


def _print(found: Comparison) -> None:
    if found.differences:
        rows = [_row(each) for each in found.differences]
        output.print_table(("name", "what", "max abs", "max rel", "detail"), rows, ("max abs", "max rel"))
    result = "equal" if found.is_equal else f"{len(found.differences)} differences"
    compared = f"{found.tensors} tensors ({output.size(found.nbytes)}) and {found.objects} objects compared"
    output.line(f"{result}: {compared}", "green" if found.is_equal else "red")


def _row(each: Difference) -> list[str]:
    measured = ("" if value is None else output.number(value) for value in (each.max_abs, each.max_rel))
    return [each.name, each.kind, *measured, each.detail]
