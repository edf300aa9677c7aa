# SPDX-License-Identifier: Apache-2.0
"""``ckpt-fast bench DIR``: what the storage of a directory can do, and what saves and loads make of it."""

from __future__ import annotations

import dataclasses

import click

from ckpt_fast.cli import output
from ckpt_fast.tools.bench import bench as measure


@click.command()
@click.argument("directory")
@click.option(
    "--size", type=click.IntRange(min=1), default=512, show_default=True, help="Size of the state in MiB."
)
@click.option("--rounds", type=click.IntRange(min=1), default=3, show_default=True, help="Rounds counted.")
@output.json_option
@output.exit_status
def bench(directory: str, size: int, rounds: int, as_json: bool) -> int:
    """Measure durable saves to DIRECTORY and loads from it, with a cold page cache.

    The limit (the same bytes as one file), ckpt_fast, and torch DCP, in turn. One process, CPU memory. What
    is written is removed.
    """
    with output.progress_bar("measuring", in_bytes=False) as progress:
        found = measure(directory, size << 20, rounds, progress)
    if as_json:
        output.print_json(
            [
                {**dataclasses.asdict(each), "median_s": each.median_s, "gb_per_s": each.gb_per_s}
                for each in found
            ]
        )
        return output.DONE
    most = max(each.gb_per_s for each in found)
    limits = {each.task: each.gb_per_s for each in found if each.contestant == "limit"}
    rows = [
        [
            each.task,
            each.contestant,
            f"{each.median_s * 1e3:.0f}",
            f"{min(each.seconds) * 1e3:.0f} to {max(each.seconds) * 1e3:.0f}",
            f"{each.gb_per_s:.2f}",
            f"{each.gb_per_s / limits[each.task]:.0%}",
            output.bar(each.gb_per_s, most),
        ]
        for each in found
    ]
    columns = ("task", "by", "median ms", "min to max", "GB/s", "of the limit", "")
    output.print_table(columns, rows, columns[2:6])
    return output.DONE
