# SPDX-License-Identifier: Apache-2.0
"""Write ``docs/api.md``: every documented name with its signature, home, summary, tests and status, and those
beside them.

python scripts/api_table.py            # write the page
python scripts/api_table.py --check # exit with 1 if it is out of date
"""

from __future__ import annotations

import argparse
import ast
import inspect
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from ckpt_fast import checkpointing

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "api.md"
# These two list every name, so they do not count; a test file counts if it tests the name itself.
LISTS_OF_NAMES = ("tests/api/documented.py", "tests/api/test_signatures.py")
SHOWN_TESTS = 3
WIDTH = 100

SUMMARIES_OF_DATA = {
    "TRACKER_PREFIX": "Begins the name of the tracker, `latest_train_state.pt`.",
    "_CHECKPOINT_VERSION": "The version this process has loaded; follows `set_checkpoint_version`.",
    "_NON_PERSISTENT_CKPT_SUBDIR": "Where temporary checkpoints lie below the `save` directory.",
    "_DIRECT_ITERATION_DIR_SENTINEL": "Stands for an iteration: the directory is a checkpoint itself.",
    "logger": "The module's logger.",
    "CONFIG_FILE": "The configuration of the run, in each checkpoint.",
    "TRAIN_STATE_FILE": "The counters of the run, in each checkpoint.",
}
HOMES_OF_DATA = {
    "_CHECKPOINT_VERSION": "ckpt_fast.trainer.contents.version",
    "logger": "ckpt_fast.checkpointing",
}
# What a name does not do yet, or does only if something else is installed.
LIMITS = {
    "save_checkpoint": "Hugging Face copies need Megatron Bridge",
    "load_checkpoint": "Hugging Face weights need Megatron Bridge",
    "init_checkpointing_context": "local checkpoints need nvidia-resiliency-ext",
    "get_save_and_finalize_callbacks": "needs nvidia-resiliency-ext",
    "preprocess_fsdp_dtensor_state_dict": "needs Megatron FSDP",
    "save_fsdp_dtensor_checkpoint": "needs Megatron FSDP",
    "load_fsdp_dtensor_checkpoint": "needs Megatron FSDP",
    "cleanup_old_non_persistent_checkpoint": "`max_iteration` is ckpt_fast's own",
    "_load_non_persistent_base_checkpoint": "`cfg` and `is_megatron_mimo` are ckpt_fast's own",
}

INTRODUCTION = """\
# Documented API

<!-- Written by scripts/api_table.py. Do not edit. -->

`ckpt_fast.checkpointing` has every name that the documentation of `megatron.bridge.training.checkpointing`
lists: {count} names. `tests/api/test_signatures.py` compares each with the documented signature. This page is
written by `scripts/api_table.py`; `tests/api/test_documented_api.py` fails when it is out of date.

It has {more} more: the configuration, state and callbacks that programs pass to it
([configuration](configuration.md)), and names of newer versions of Megatron Bridge. Those of
`megatron.bridge.training.utils.checkpoint_utils` are in `ckpt_fast.checkpoint_utils` as well. They are listed
[at the end](#beside-the-documented-names).

*Status* is "tested" when at least one test outside the signature test uses the name, else "signature only".
It also says what a name does not do yet. At most {shown} test files are shown for a name.
"""


class Entry(NamedTuple):
    """One documented name; ``home`` is the full name of its module."""

    name: str
    home: str
    signatures: list[str]
    summary: str


def documented_names() -> list[str]:
    """Return the names of the documented module; those beside them are added to ``__all__`` afterwards."""
    tree = ast.parse((ROOT / "ckpt_fast" / "checkpointing.py").read_text())
    assigned = (node.value for node in tree.body if isinstance(node, ast.Assign))
    return next(ast.literal_eval(value) for value in assigned if isinstance(value, ast.List))


def entries(names: Iterable[str]) -> list[Entry]:
    """Return these names of ``ckpt_fast.checkpointing``, by home and then by name."""
    imported = homes_in_source(ROOT / "ckpt_fast" / "checkpointing.py")
    found = []
    for name in names:
        value = getattr(checkpointing, name)
        if name in SUMMARIES_OF_DATA:
            home = HOMES_OF_DATA.get(name) or imported[name]
            shown = "logger: logging.Logger" if name == "logger" else f"{name} = {quoted(repr(value))}"
            found.append(Entry(name, home, [shown], SUMMARIES_OF_DATA[name]))
        else:
            found.append(Entry(name, imported[name], signatures(name, value), first_line(value)))
    return sorted(found, key=lambda entry: (entry.home, entry.name.lstrip("_").lower()))


def homes_in_source(path: Path) -> dict[str, str]:
    """Map each name that ``path`` imports by ``from module import name`` to its module."""
    tree = ast.parse(path.read_text())
    return {
        alias.name: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
    }


def signatures(name: str, value: Any) -> list[str]:
    """Return a function's signature, or those of a class and its public methods."""
    if not inspect.isroutine(value) and not inspect.isclass(value):
        return [signature_text(name, type(value).__call__).replace("(self, ", "(")]
    if not inspect.isclass(value):
        return [signature_text(name, value)]
    members = getattr(value, "__members__", None)
    if members is not None:
        return [f"{name}: {', '.join(members)}"]
    found = [signature_text(name, value)]
    for method, function in vars(value).items():
        if inspect.isfunction(function) and not method.startswith("_"):
            found.append(signature_text(f"{name}.{method}", function))
        elif isinstance(function, property):
            returns = inspect.signature(function.fget).return_annotation  # type: ignore[arg-type]
            found.append(f"{name}.{method} -> {returns}")
    return found


def signature_text(name: str, value: Any) -> str:
    """Format ``name(parameters) -> result`` on one line if it fits, otherwise with one line per parameter."""
    signature = inspect.signature(value)
    parts, keyword_only = [], False
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not keyword_only:
            parts.append("*")
            keyword_only = True
        parts.append(parameter_text(parameter))
    result = "" if inspect.isclass(value) else f" -> {signature.return_annotation}"
    line = f"{name}({', '.join(parts)}){result}"
    if len(line) > WIDTH:
        line = "\n".join([f"{name}(", *(f"    {part}," for part in parts), f"){result}"])
    return quoted(line)


def quoted(text: str) -> str:
    """Return Python source with double quotes, as the project writes it."""
    return text.replace("'", '"')


def parameter_text(parameter: inspect.Parameter) -> str:
    text = parameter.name
    if parameter.annotation is not parameter.empty:
        text += f": {parameter.annotation}"
    if parameter.default is not parameter.empty:
        text += f" = {parameter.default!r}"
    return text


def first_line(value: Any) -> str:
    """Return the first sentence of the docstring, as Markdown on one line."""
    paragraph = " ".join((inspect.getdoc(value) or "").split("\n\n")[0].split())
    sentence = re.split(r"(?<=[^.]\.) (?=[A-Z`])", paragraph)[0]
    return sentence.replace("``", "`").replace("|", "\\|")


def tests_of(name: str) -> list[str]:
    """Return the test files that use ``name`` most, best first; helpers only if no test uses it."""
    counts = {
        path.relative_to(ROOT).as_posix(): uses(path)[name] for path in sorted((ROOT / "tests").rglob("*.py"))
    }
    found = [path for path in counts if counts[path] and path not in LISTS_OF_NAMES]
    tests = [path for path in found if Path(path).name.startswith("test_")]
    return sorted(tests or found, key=lambda path: (-counts[path], path))[:SHOWN_TESTS]


@cache
def uses(path: Path) -> Counter[str]:
    """Count how often a file uses each name from ckpt_fast, imported by itself or as ``module.name``."""
    tree = ast.parse(path.read_text())
    ours = {
        alias.asname or alias.name: alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "ckpt_fast"
        for alias in node.names
    }
    found: Counter[str] = Counter()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id in ours:
            found[ours[node.id]] += 1
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ours:
            found[node.attr] += 1
    return found


def render(tests: Callable[[str], list[str]]) -> str:
    """Render the whole page; ``tests`` returns the test files to show for a name."""
    documented = documented_names()
    beside = [name for name in checkpointing.__all__ if name not in documented]
    homes: dict[str, list[Entry]] = defaultdict(list)
    for entry in entries(documented):
        homes[entry.home].append(entry)
    lines = [INTRODUCTION.format(count=len(documented), more=len(beside), shown=SHOWN_TESTS)]
    for home, members in homes.items():
        path = home.replace(".", "/") + ".py"
        lines += [f"## [`{path}`](../{path})", "", "```python"]
        lines += [signature for entry in members for signature in entry.signatures]
        lines += ["```", "", "| name | what it does | tests | status |", "|---|---|---|---|"]
        lines += [row(entry, tests(entry.name)) for entry in members]
        lines.append("")
    lines += ["## Beside the documented names", "", "| name | home | what it is |", "|---|---|---|"]
    for entry in entries(beside):
        path = entry.home.replace(".", "/") + ".py"
        lines.append(f"| `{entry.name}` | [`{path}`](../{path}) | {entry.summary} |")
    return "\n".join(lines).rstrip() + "\n"


def row(entry: Entry, tests: list[str]) -> str:
    links = ", ".join(f"[{Path(path).stem}](../{path})" for path in tests)
    status = "tested" if tests else "signature only"
    if entry.name in LIMITS:
        status += f"; {LIMITS[entry.name]}"
    return f"| `{entry.name}` | {entry.summary} | {links} | {status} |"


def problems(page: str) -> list[str]:
    """Return the ways in which ``page`` is out of date.

    New tests may have appeared, even for a name that had none: a page that goes out of date with every new
    test would be a nuisance. What is shown must be correct.
    """
    shown = {
        match["name"]: re.findall(r"\]\(\.\./(tests/[^)]+)\)", match["tests"])
        for match in re.finditer(r"^\| `(?P<name>\w+)` \|.*? \| (?P<tests>[^|]*) \| [^|]* \|$", page, re.M)
    }
    wrong = [
        f"{path} does not use {name}"
        for name, paths in shown.items()
        for path in paths
        if not (ROOT / path).is_file() or not uses(ROOT / path)[name]
    ]
    if render(lambda name: shown.get(name, [])) != page:
        wrong.append("names, signatures, homes, summaries or limits have changed")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    if not parser.parse_args().check:
        PAGE.write_text(render(tests_of))
        return 0
    found = problems(PAGE.read_text())
    for problem in found:
        sys.stderr.write(f"docs/api.md: {problem}; run python scripts/api_table.py\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
