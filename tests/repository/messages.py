# SPDX-License-Identifier: Apache-2.0
"""The messages of ckpt_fast's errors and warnings, read from its source."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from ckpt_fast import errors

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "ckpt_fast"

ERRORS = {
    name
    for name, value in vars(errors).items()
    if isinstance(value, type) and issubclass(value, errors.CheckpointError)
}
# What else is raised on ckpt_fast's own account.
MORE_ERRORS = {"GluRankError", "GluRowsError", "RefusedPickleError", "UnavailableError"}
WARNINGS = {"warning", "error", "exception", "critical"}
HELPERS = {"warn_rank_0", "warn_rank_last"}
GAP = "…"
MOST_SHOWN = 90


def template(node: ast.expr) -> str | None:
    """Return a message with a gap for each value in it; None if it is not written there."""
    if isinstance(node, ast.Constant):
        return str(node.value) if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        parts = [str(each.value) if isinstance(each, ast.Constant) else GAP for each in node.values]
        return "".join(parts)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = template(node.left), template(node.right)
        return None if left is None and right is None else (left or GAP) + (right or GAP)
    return None


def normalized(text: str) -> str:
    """Return a message as the page shows it: gaps for values, one line, no gaps side by side."""
    text = re.sub(r"%(?:\.\d+)?[sdrf]|\{[^}]*\}", GAP, text)
    text = " ".join(text.split())
    return re.sub(f"{GAP}(?:[ ,:]*{GAP})+", GAP, text).strip()


def name_of(function: ast.expr) -> str:
    return ast.unparse(function).rpartition(".")[2]


def messages_in(path: Path) -> Iterator[tuple[int, str, str]]:
    """Yield (line, kind, message) of a module; the kind is the class of an error, or "warning"."""
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call) or not node.args:
            continue
        name = name_of(node.func)
        is_log = name in WARNINGS and ast.unparse(node.func).partition(".")[0] in ("logger", "_logger")
        if name in ERRORS | MORE_ERRORS or is_log or name in HELPERS:
            text = template(node.args[0])
            if text is not None and re.search(r"[a-z]{3}", text):
                yield node.lineno, name if name in ERRORS | MORE_ERRORS else "warning", normalized(text)


def all_messages() -> dict[str, tuple[str, str]]:
    """Map each message to (kind, where)."""
    found: dict[str, tuple[str, str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        for line, kind, text in messages_in(path):
            found.setdefault(text, (kind, f"{path.relative_to(ROOT)}:{line}"))
    return found


def shown(text: str) -> str | None:
    """Return what the page shows of a message: its first sentence, or as much of it as fits.

    None if it says nothing by itself: some messages are only a frame for others.
    """
    sentence = re.split(r"(?<=[^.]\.) (?=[A-Z…'])|; ", text)[0].rstrip(".")
    if len(sentence) > MOST_SHOWN:
        sentence = sentence[:MOST_SHOWN].rpartition(" ")[0]
    words = re.findall(r"[a-zA-Z_]{2,}", sentence)
    return sentence if len(words) > 2 else None
