# SPDX-License-Identifier: Apache-2.0
"""The states a disk may be in after a crash at any position of what ``recorder.c`` has recorded.

A disk guarantees that a file has the content of its last fsync and a directory the names of its last fsync.
Of everything since then, each change of a directory and each file's content may independently have reached
the disk or not. A change is everything that one call does to one directory: a rename removes the old name and
adds the new one, and an exchange updates both names, or neither happens.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Union

# A directory maps names to what they refer to, in order. A file maps to its content.
Tree = tuple[tuple[str, Union["Tree", bytes]], ...]


class Call(NamedTuple):
    """A line of the log. ``name`` is "note" for a message of the program under test, in ``path``."""

    name: str
    inode: int
    path: str
    second: str
    content: bytes

    def __str__(self) -> str:
        return " ".join(filter(None, (self.name, self.path, self.second)))


def read_log(log: str, root: str) -> list[Call]:
    """Return the recorded calls, with paths relative to ``root``."""
    calls, contents = [], dict[bytes, bytes]()
    for line in Path(log).read_text().splitlines():
        name, inode, path, second, copy = line.split("\t")
        content = Path(copy).read_bytes() if copy else b""
        content = contents.setdefault(content, content)  # one object per content makes comparing fast
        calls.append(Call(name, int(inode), _below(root, path), _below(root, second), content))
    return calls


def note(log: str, text: str) -> None:
    """Add a note to the log while nothing else is being recorded."""
    with open(log, "a") as file:
        file.write(f"note\t0\t{text}\t\t\n")


def _below(root: str, path: str) -> str:
    return os.path.relpath(path, root) if path.startswith(root) else path


@dataclass(eq=False)
class File:
    """A file, independent of its names.

    Attributes:
        visible: its content as of the last recorded call: partial writes are not recorded.
        promised: the content of the last sync; None before that.
    """

    visible: bytes = b""
    promised: bytes | None = None

    @property
    def is_pending(self) -> bool:
        return self.promised != self.visible

    def possible(self) -> list[bytes]:
        """Return what it may contain after a power loss: the promised content first, the visible one last."""
        if not self.is_pending:
            return [self.visible]
        content, zeros = self.visible, bytes(len(self.visible))
        torn = content[: len(content) // 2]
        before = [b"", zeros] if self.promised is None else [self.promised]
        return [*before, torn, torn + zeros[len(torn) :], content]


@dataclass(eq=False)
class Directory:
    """A directory, independent of its name.

    Attributes:
        names: the visible names.
        promised: the names of the last sync.
        changes: changes of names since then.
    """

    names: dict[str, Node] = field(default_factory=dict)
    promised: dict[str, Node] = field(default_factory=dict)
    changes: list[Change] = field(default_factory=list)

    def change(self, names: Change) -> None:
        self.changes.append(names)
        _apply(names, self.names)

    def sync(self) -> None:
        self.promised, self.changes = dict(self.names), []

    def with_changes(self, changes: Sequence[Change]) -> dict[str, Node]:
        names = dict(self.promised)
        for each in changes:
            _apply(each, names)
        return names


Node = File | Directory
# What one call does to the names of one directory; None removes a name.
Change = dict[str, File | Directory | None]


def _apply(change: Change, names: dict[str, Node]) -> None:
    for name, node in change.items():
        if node is None:
            names.pop(name, None)
        else:
            names[name] = node


class Disk:
    """A disk that was empty and synced, and the effects of calls on it since."""

    def __init__(self) -> None:
        self.root = Directory()
        self._nodes: dict[int, Node] = {}

    def do(self, call: Call) -> None:
        """Apply one more call."""
        if call.name == "note":
            return
        if call.name == "mkdir":
            self._nodes[call.inode] = directory = Directory()
            self._name(call.path, directory)
        elif call.name == "create":
            self._nodes[call.inode] = file = File()
            self._name(call.path, file)
        elif call.name == "content":
            self._see(call)
        elif call.name == "sync":
            node = self._nodes.get(call.inode, self.root)
            if isinstance(node, Directory):
                node.sync()
            else:
                self._see(call)
                node.promised = node.visible
        elif call.name == "unlink":
            self._name(call.path, None)
        elif call.name == "link":
            self._name(call.second, self._find(call.path))
        elif call.name in ("rename", "exchange"):
            replaced = self._find(call.second) if call.name == "exchange" else None
            self._move(call.path, call.second, replaced)
        else:
            raise ValueError(f"{call}: no such call is known")

    def visible(self) -> Tree:
        """Return what is left when the program is killed."""
        return self._tree(lambda each: each.names, lambda each: each.visible)

    def after_power_loss(self, seeds: Sequence[int]) -> Iterator[tuple[str, Tree]]:
        """Yield possible disks after a power loss, with labels: the worst ones, and some for each seed."""
        directories, files = self._pending()
        changes = [(directory, change) for directory in directories for change in directory.changes]
        yield "nothing but what is promised", self._with([], [])
        yield "all names, promised contents", self._with(changes, [])
        yield "promised names, all contents", self._with([], files)
        for directory in directories:
            own = [each for each in changes if each[0] is directory]
            yield "only the names of one directory", self._with(own, files)
        for number, (_, change) in enumerate(changes):
            others = changes[:number] + changes[number + 1 :]
            yield f"all but the change of {' and '.join(change)}", self._with(others, files)
        for number in range(len(files)):
            yield "all but the content of one file", self._with(changes, files[:number] + files[number + 1 :])
        for seed in seeds:
            yield f"by chance {seed}", self._by_chance(random.Random(seed))

    def _with(self, changes: Sequence[tuple[Directory, Change]], files: Sequence[File]) -> Tree:
        """Return the promised state, plus these changes and the visible contents of these files."""
        by_directory: dict[Directory, list[Change]] = {}
        for directory, change in changes:
            by_directory.setdefault(directory, []).append(change)
        return self._tree(
            lambda each: each.with_changes(by_directory.get(each, [])),
            lambda each: each.possible()[-1 if each in files else 0],
        )

    def _by_chance(self, chance: random.Random) -> Tree:
        def names(directory: Directory) -> dict[str, Node]:
            likely = chance.choice((0.2, 0.5, 0.8))
            return directory.with_changes([each for each in directory.changes if chance.random() < likely])

        return self._tree(names, lambda each: chance.choice(each.possible()))

    def _pending(self) -> tuple[list[Directory], list[File]]:
        """Return what a power loss may or may not lose, among everything still reachable."""
        found: dict[Node, None] = {}

        def walk(node: Node) -> None:
            if node in found:
                return
            found[node] = None
            if isinstance(node, Directory):
                for names in (node.promised, *node.changes):
                    for child in filter(None, names.values()):
                        walk(child)

        walk(self.root)
        return (
            [each for each in found if isinstance(each, Directory) and each.changes],
            [each for each in found if isinstance(each, File) and each.is_pending],
        )

    def _tree(self, names: Callable[[Directory], dict[str, Node]], content: Callable[[File], bytes]) -> Tree:
        # A file with two names has one content.
        contents: dict[File, bytes] = {}

        def tree_of(node: Node) -> Tree | bytes:
            if isinstance(node, File):
                return contents.setdefault(node, content(node))
            return tuple((name, tree_of(child)) for name, child in sorted(names(node).items()))

        tree = tree_of(self.root)
        assert isinstance(tree, tuple)
        return tree

    def _find(self, path: str) -> Node:
        node: Node = self.root
        for name in path.split("/") if path != "." else []:
            assert isinstance(node, Directory), f"{path} was not recorded"
            node = node.names[name]
        return node

    def _parent(self, path: str) -> tuple[Directory, str]:
        above, _, name = path.rpartition("/")
        directory = self._find(above or ".")
        assert isinstance(directory, Directory)
        return directory, name

    def _name(self, path: str, node: Node | None) -> None:
        directory, name = self._parent(path)
        directory.change({name: node})

    def _move(self, path: str, second: str, replaced: Node | None) -> None:
        node, (source, old), (target, new) = self._find(path), self._parent(path), self._parent(second)
        if source is target:
            source.change({old: replaced, new: node})
        else:
            source.change({old: replaced})
            target.change({new: node})

    def _see(self, call: Call) -> None:
        file = self._nodes[call.inode]
        assert isinstance(file, File)
        file.visible = call.content


def lay_out(tree: Tree, directory: str) -> None:
    """Create the tree in ``directory``, which must not exist."""
    os.mkdir(directory)
    for name, node in tree:
        path = os.path.join(directory, name)
        if isinstance(node, bytes):
            Path(path).write_bytes(node)
        else:
            lay_out(node, path)


def tree_of(directory: str) -> Tree:
    """Return the contents of a directory."""
    entries = sorted(os.scandir(directory), key=lambda each: each.name)
    return tuple(
        (each.name, tree_of(each.path) if each.is_dir() else Path(each.path).read_bytes()) for each in entries
    )
