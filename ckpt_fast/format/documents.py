# SPDX-License-Identifier: Apache-2.0
"""JSON and YAML of a checkpoint: plain data, in time and memory that the length of the text justifies."""

from __future__ import annotations

import json
import re
from typing import Any

import yaml

# The C parser is ten times as fast.
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
# How much a document may grow when what its aliases share is written out.
_GROWTH_PER_BYTE = 64
_FREE_GROWTH = 100_000
# Composing a document, and what reads the values later, recurse for every level. In the C parser nothing but
# the size of the thread's stack would end that.
_DEEPEST = 100
# Python refuses to read longer numbers too, but not in all notations.
_LONGEST_NUMBER = 4096
# Of which the slow parser may take seconds.
_SHORT = 256 << 10
_HALF_A_CHARACTER = re.compile(rb"\\[uU](?:0000)?[dD][89a-fA-F]")
_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")


def parse_json(content: bytes) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is none, or is nested too deep.
    """
    try:
        return json.loads(content)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error


def parse_yaml(content: bytes) -> Any:
    """The value of a YAML document of plain data (``yaml.safe_load``); None for an empty one.

    Raises:
        yaml.YAMLError: it is none, or names a class.
        ValueError: it is nested too deep, contains itself, or repeats itself beyond measure by its
            aliases.
    """
    try:
        try:
            return _parse_yaml(content, _Loader)
        except yaml.YAMLError:
            # The C parser refuses what PyYAML writes for a path that is no UTF-8.
            if len(content) > _SHORT or not _HALF_A_CHARACTER.search(content):
                raise
            return _parse_yaml(content, yaml.SafeLoader)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error


def _parse_yaml(content: bytes, loader_class: Any) -> Any:
    may_expand = _scan(content, loader_class)
    loader = loader_class(content)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        if may_expand and _written_out(node) > _GROWTH_PER_BYTE * len(content) + _FREE_GROWTH:
            raise ValueError("its aliases repeat more than a document of this length may hold")
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _scan(content: bytes, loader_class: Any) -> bool:
    """Return whether it has an alias, or a scalar too long for a number.

    Nesting is measured on the event stream, which is produced without recursion.
    """
    depth, may_expand = 0, False
    for event in yaml.parse(content, loader_class):
        if isinstance(event, yaml.ScalarEvent):
            may_expand |= len(event.value) > _LONGEST_NUMBER
        elif isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > _DEEPEST:
                raise ValueError("it is nested too deep")
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        elif isinstance(event, yaml.AliasEvent):
            may_expand = True
    return may_expand


def _written_out(root: yaml.Node) -> float:
    """The number of nodes in the document after every alias is expanded."""
    sizes: dict[int, float] = {}
    open_nodes: set[int] = set()
    pending: list[tuple[yaml.Node, bool]] = [(root, False)]
    while pending:
        node, children_are_known = pending.pop()
        if children_are_known:
            open_nodes.discard(id(node))
            sizes[id(node)] = 1.0 + sum(sizes[id(child)] for child in _children(node))
        elif id(node) in open_nodes:
            raise ValueError("it contains itself")
        elif id(node) not in sizes:
            open_nodes.add(id(node))
            pending.append((node, True))
            pending.extend((child, False) for child in _children(node))
    return sizes[id(root)]


def _children(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    if isinstance(node, yaml.SequenceNode):
        return list(node.value)
    if node.tag in _NUMBERS and len(node.value) > _LONGEST_NUMBER:
        raise ValueError(f"it has a number of {len(node.value)} digits")
    return []
