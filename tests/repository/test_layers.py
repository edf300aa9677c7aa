# SPDX-License-Identifier: Apache-2.0
"""The architecture, enforced: import directions, what native code includes, size limits."""

from __future__ import annotations

import ast
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "ckpt_fast"
MODULES = sorted(PACKAGE.rglob("*.py"))

# Lowest first. A module imports from its own layer and from those below it.
LAYERS = [
    {"errors", "once", "settings", "system"},
    {"optional"},
    {"native"},
    {"version"},
    {"format"},
    {"ranks"},
    {"jobs"},
    {"storage"},
    {"pipeline.memory"},
    {"pipeline.save", "pipeline.load"},
    {"pipeline"},
    {"retention"},
    {"compat"},
    {"glu"},
    {"doors"},
    {"run"},
    {"callbacks", "config", "state"},
    {"manager"},
    {"trainer"},
    {"verification"},
    {"tools"},
    {"checkpoint_utils", "checkpointing", "cli", "__init__"},
]
LEVEL = {room: level for level, layer in enumerate(LAYERS) for room in layer}

# Optional or replaceable packages, each imported in one place.
HOMES = {
    "megatron": "compat",
    "nvidia_resiliency_ext": "compat",
    "multistorageclient": "storage",
    "modelopt": "compat",
    "transformer_engine": "compat",
    "click": "cli",
    "rich": "cli",
    "hypothesis": None,
    "pytest": None,
    "tests": None,
}

MOST_FILES = 14
MOST_LINES = 400
MOST_FUNCTION_LINES = 60


def part_of(path: Path) -> str:
    """Return the first name below the package: "pipeline" for ckpt_fast/pipeline/save/plan.py."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def room_of(name: str) -> str | None:
    """Return the room of a dotted name below the package: "pipeline.save" for "pipeline.save.plan.Plan"."""
    parts = name.split(".")
    rooms = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next((room for room in rooms if room in LEVEL), None)


def room_of_file(path: Path) -> str | None:
    return room_of(".".join(path.relative_to(PACKAGE).with_suffix("").parts))


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line, dotted name) of every import at any level, including names passed to import_module."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} is a relative import"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            for argument in node.args[:1]:
                text = argument.values[0] if isinstance(argument, ast.JoinedStr) else argument
                if isinstance(text, ast.Constant):
                    yield node.lineno, str(text.value)


def test_every_module_has_a_room() -> None:
    assert [path for path in MODULES if room_of_file(path) is None] == []


@pytest.mark.parametrize("room", sorted(LEVEL))
def test_imports_point_down(room: str) -> None:
    own = [path for path in MODULES if room_of_file(path) == room]
    assert own, f"there is no {room}"
    upward = []
    for path in own:
        for line, name in imports(path):
            other = room_of(name.removeprefix("ckpt_fast."))
            if not name.startswith("ckpt_fast.") or other is None or other == room:
                continue
            if LEVEL[other] >= LEVEL[room]:
                upward.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    assert upward == []


def test_packages_are_imported_in_their_homes_only() -> None:
    strays = []
    for path in MODULES:
        for line, name in imports(path):
            first = name.split(".")[0]
            if first in HOMES and part_of(path) != HOMES[first]:
                strays.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    assert strays == []


@pytest.mark.parametrize("part", ["native", "errors", "settings", "system"])
def test_the_lowest_layers_do_not_know_torch(part: str) -> None:
    for path in MODULES:
        if part_of(path) == part:
            assert not [name for _, name in imports(path) if name.split(".")[0] == "torch"], path


def test_importing_one_door_does_not_import_what_it_has_no_need_of() -> None:
    """In one process, in this order, so that nothing is there that another import has brought along."""
    forbidden = {
        "ckpt_fast.native.fallback": ["torch", "megatron", "nvidia_resiliency_ext"],
        "ckpt_fast.pipeline.save.save": ["megatron", "nvidia_resiliency_ext"],
        "ckpt_fast.pipeline.load.load": ["megatron", "nvidia_resiliency_ext"],
        "ckpt_fast.doors.dcp": ["megatron", "nvidia_resiliency_ext"],
        "ckpt_fast.manager.manager": ["megatron", "nvidia_resiliency_ext"],
    }
    code = "import importlib, sys\n"
    for module, names in forbidden.items():
        code += f"importlib.import_module({module!r})\n"
        code += f"print(*({module!r} + ' imports ' + name for name in {names} if name in sys.modules))\n"
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True
    )
    assert ran.stdout.split() == []


def test_no_import_cycles() -> None:
    """Between modules, at import time: imports inside functions may point back."""
    graph: dict[str, set[str]] = {}
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in MODULES}
    for name, path in names.items():
        found = set()
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                found |= {node.module, f"{node.module}.__init__"}
                found |= {f"{node.module}.{alias.name}" for alias in node.names}
        graph[name] = {other for other in found if other in names and other != name}
    while leaves := [name for name, needs in graph.items() if not needs & set(graph)]:
        for name in leaves:
            del graph[name]
    assert graph == {}


# Native code.


def native_files(*folders: str) -> list[Path]:
    return [
        path for folder in folders for path in sorted((ROOT / "csrc" / folder).rglob("*")) if path.is_file()
    ]


def includes(path: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(), re.MULTILINE)


@pytest.mark.parametrize(
    ("folder", "forbidden"),
    [
        ("engine", r"Python\.h|pybind11|torch/|c10/|ATen/|cuda"),
        ("cuda", r"Python\.h|pybind11|torch/|c10/|ATen/"),
    ],
)
def test_native_code_does_not_know_what_is_above_it(folder: str, forbidden: str) -> None:
    files = native_files(folder)
    assert files
    bad = [
        f"{path.name} includes {name}"
        for path in files
        for name in includes(path)
        if re.match(forbidden, name)
    ]
    assert bad == []


def test_only_csrc_python_includes_pybind11() -> None:
    files = native_files("engine", "cuda", "python")
    users = {path.parent.name for path in files if "pybind11" in path.read_text()}
    assert users == {"python"}


# Size.


def sources() -> list[Path]:
    """Return all hand-written source files."""
    folders = [ROOT / name for name in ("ckpt_fast", "csrc", "tests", "benchmarks", "examples")]
    suffixes = {".py", ".pyi", ".cc", ".cu", ".h", ".cuh"}
    return sorted(path for folder in folders for path in folder.rglob("*") if path.suffix in suffixes)


def code_lines(function: ast.AST, text: list[str]) -> int:
    """Return the number of code lines: no docstring, comments, blank lines, decorators or signature."""
    assert isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
    body = function.body
    if isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
        body = body[1:]
    if not body:
        return 0
    assert body[-1].end_lineno is not None
    lines = "\n".join(text[body[0].lineno - 1 : body[-1].end_lineno])
    return sum(1 for line in lines.splitlines() if line.strip() and not line.strip().startswith("#"))


def test_folders_show_what_is_in_them() -> None:
    folders: dict[str, int] = {}
    for path in sources():
        folder = str(path.parent.relative_to(ROOT))
        folders[folder] = folders.get(folder, 0) + 1
    assert {folder: files for folder, files in folders.items() if files > MOST_FILES} == {}


def test_every_room_says_what_belongs_there() -> None:
    rooms = [path for path in MODULES if path.name == "__init__.py"]
    assert [path for path in rooms if not ast.get_docstring(ast.parse(path.read_text()))] == []


def test_files_are_short() -> None:
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in sources()}
    assert {path: lines for path, lines in lengths.items() if lines > MOST_LINES} == {}


def test_functions_read_in_one_view() -> None:
    long = {}
    for path in sources():
        if path.suffix != ".py":
            continue
        text = path.read_text()
        all_lines = text.splitlines()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = code_lines(node, all_lines)
                if lines > MOST_FUNCTION_LINES:
                    long[f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"] = lines
    assert long == {}


def test_every_file_names_its_license() -> None:
    missing = [
        str(path.relative_to(ROOT))
        for path in sources()
        if "SPDX-License-Identifier: Apache-2.0" not in path.read_text().partition("\n")[0]
    ]
    assert missing == []


def test_no_notes_to_oneself() -> None:
    found = []
    for path in MODULES:
        for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline):
            if token.type == tokenize.COMMENT and re.search(r"\b(TODO|FIXME|XXX|HACK)\b", token.string):
                found.append(f"{path.relative_to(ROOT)}:{token.start[0]}")
    assert found == []
