# SPDX-License-Identifier: Apache-2.0
"""``ckpt-fast inspect PATH``: what a checkpoint is, and what is in it."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

import click
from rich.markup import escape
from rich.tree import Tree

from ckpt_fast.cli import output
from ckpt_fast.tools import inspect as tools


@click.command()
@click.argument("path")
@click.option("--tensor", metavar="NAME", help="Read this tensor, and show what its elements are like.")
@click.option("--depth", type=click.IntRange(min=1), help="Add up what is deeper in the tree of names.")
@output.json_option
@output.exit_status
def inspect(path: str, tensor: str | None, depth: int | None, as_json: bool) -> int:
    """Show what a checkpoint is, who wrote it, and its tensors with shape, dtype, bytes and shards.

    PATH is a checkpoint, or a directory of checkpoints, of which the selected one is shown. Nothing but its
    small files is read, unless --tensor is given.
    """
    if tensor is not None:
        return _tensor(path, tensor, as_json)
    found = tools.inspect(path)
    if as_json:
        output.print_json({**dataclasses.asdict(found), "nbytes": found.nbytes})
        return output.DONE
    _head(found)
    lines = _lines(found)
    if output.is_terminal():
        output.console().print(_tree(lines, depth))
    else:
        rows = _summed(lines, depth)
        output.print_table(("name", "kind", "shape", "bytes", "shards"), rows, ("bytes", "shards"))
    return output.DONE


def _tensor(path: str, name: str, as_json: bool) -> int:
    with output.progress_bar(f"reading {name}") as progress:
        found = tools.statistics(path, name, progress)
    values = dataclasses.asdict(found)
    if as_json:
        output.print_json({"name": name, **values})
        return output.DONE
    output.line(name, "bold")
    for key, value in values.items():
        output.line(f"  {key:<10}  {output.number(value) if isinstance(value, float) else value}")
    return output.DONE


def _head(found: tools.Inspection) -> None:
    versions = ", ".join(f"{name} {version}" for name, version in found.versions.items())
    facts = {
        "format": found.format,
        "iteration": "not known" if found.iteration is None else str(found.iteration),
        "written by": found.writer + (f" ({versions})" if versions else ""),
        "layout": found.layout,
        "save": found.save_id or "",
        "content": f"{len(found.tensors)} tensors, {len(found.objects)} objects, {output.size(found.nbytes)}",
    }
    output.line(found.path, "bold")
    for name, fact in facts.items():
        if fact:
            output.line(f"  {name + ':':<12}{fact}")
    output.line()


class _Line(NamedTuple):
    name: str
    kind: str
    shape: str
    nbytes: int
    shards: int


def _lines(found: tools.Inspection) -> list[_Line]:
    lines = [
        _Line(each.name, each.dtype, str(list(each.shape)), each.nbytes, each.shards)
        for each in found.tensors
    ]
    lines += [_Line(each.name, "object", "", each.nbytes, 1) for each in found.objects]
    return sorted(lines)


def _keys(name: str) -> list[str]:
    """The parts of a name; Megatron-Core's numbering of objects belongs to the last."""
    keys, shard, number = name.partition("/shard_")
    *first, last = keys.split(".")
    return [*first, last + shard + number]


def _summed(lines: Iterable[_Line], depth: int | None) -> list[list[str]]:
    """Rows of a table; names of more than ``depth`` parts are added up."""
    groups: dict[str, list[_Line]] = defaultdict(list)
    for each in lines:
        keys = _keys(each.name)
        is_deeper = depth is not None and len(keys) > depth
        groups[".".join(keys[:depth]) + ".*" if is_deeper else each.name].append(each)
    rows = []
    for name, group in groups.items():
        first = group[0]
        is_one = name == first.name
        rows.append(
            [
                name,
                first.kind if is_one else f"{len(group)} entries",
                first.shape if is_one else "",
                output.size(sum(each.nbytes for each in group)),
                str(sum(each.shards for each in group)),
            ]
        )
    return rows


def _tree(lines: Iterable[_Line], depth: int | None) -> Tree:
    root = Tree("", hide_root=True, guide_style="dim")
    _grow(root, [(_keys(each.name), each) for each in lines], depth)
    return root


def _grow(node: Tree, entries: list[tuple[list[str], _Line]], depth: int | None) -> None:
    groups: dict[str, list[tuple[list[str], _Line]]] = defaultdict(list)
    for parts, each in entries:
        groups[parts[0]].append((parts[1:], each))
    for key, group in groups.items():
        leaves = [each for parts, each in group if not parts]
        inner = [(parts, each) for parts, each in group if parts]
        for each in leaves:
            shards = f"  {each.shards} shards" if each.shards > 1 else ""
            node.add(
                f"[bold]{escape(key)}[/]  {each.kind} {escape(each.shape)}  "
                f"[cyan]{output.size(each.nbytes)}[/]{shards}"
            )
        if inner:
            nbytes = output.size(sum(each.nbytes for _, each in inner))
            branch = node.add(f"{escape(key)}  [dim]{len(inner)} entries, {nbytes}[/]")
            if depth is None or depth > 1:
                _grow(branch, inner, None if depth is None else depth - 1)
