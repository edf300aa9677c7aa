# SPDX-License-Identifier: Apache-2.0
"""What users are told to call is in ``ckpt_fast`` itself, or in one of its modules for users."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import ckpt_fast

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "ckpt_fast"
# For those who work on the project.
OF_DEVELOPERS = {"architecture.md", "api.md", "extending.md"}
DOCUMENTS = [
    ROOT / "README.md",
    *(path for path in sorted((ROOT / "docs").glob("*.md")) if path.name not in OF_DEVELOPERS),
]
# Modules that users import from, or run. The others may change at any time.
MODULES = {"callbacks", "checkpoint_utils", "checkpointing", "config", "errors", "run", "state"}
PATH = re.compile(r"\bckpt_fast\.([A-Za-z_]\w*)")
# A file of a checkpoint, and what doctor says of the engine.
NO_NAMES = {"json", "native"}


def internal(text: str) -> list[str]:
    """Return the names in ``ckpt_fast`` that a text gives users and that are not for them."""
    public = {*ckpt_fast.__all__, *MODULES, "__version__", *NO_NAMES}
    return [name for name in PATH.findall(text) if name not in public]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_documents_name_what_is_public(document: Path) -> None:
    assert internal(document.read_text()) == []


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.name)
def test_examples_import_what_is_public(example: Path) -> None:
    text = example.read_text()
    assert internal(text) == []
    imported = re.findall(r"^from ckpt_fast import ([^(\n]+)$", text, re.M)
    names = {name.strip() for line in imported for name in line.split(",")}
    assert names <= {*ckpt_fast.__all__, *MODULES}


def messages(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line, text) of all string constants of a module that may be sentences, docstrings aside."""
    tree = ast.parse(path.read_text())
    nodes = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, nodes) and node.body and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if not isinstance(node, ast.Constant) or id(node) in docstrings:
            continue
        if isinstance(node.value, str) and " " in node.value:
            yield node.lineno, node.value


def test_messages_name_what_is_public() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line} {name}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for line, text in messages(path)
        for name in internal(text)
    ]
    assert found == []


@pytest.mark.parametrize("name", ckpt_fast.__all__)
def test_public_names_can_be_imported_and_are_documented(name: str) -> None:
    value = getattr(ckpt_fast, name)
    assert (inspect.getdoc(value) or "").strip(), f"ckpt_fast.{name} has no docstring"
    assert name in ckpt_fast._HOMES


def test_all_homes_are_public() -> None:
    assert set(ckpt_fast._HOMES) == set(ckpt_fast.__all__)
