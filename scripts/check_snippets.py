# SPDX-License-Identifier: Apache-2.0
"""Check the types in all Python snippets of README and docs, as the type checker of a user would.

python scripts/check_snippets.py                # mypy --strict
python scripts/check_snippets.py --pyright      # pyright, strict; or basedpyright, whichever is installed
python scripts/check_snippets.py --python PATH  # against the wheel that is installed for this interpreter

The snippets see the package as the wheel has it: built into a folder, away from the checkout, or installed.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Written by a script; its blocks are signatures.
NO_SNIPPETS = "api.md"
PAGES = sorted(page for page in (ROOT / "docs").glob("*.md") if page.name != NO_SNIPPETS)
DOCUMENTS = [ROOT / "README.md", *PAGES]
FENCE = re.compile(r"^```python\n(.*?)^```$", re.M | re.S)

# What the text around the snippets says is there.
GIVEN = """
from typing import Any
from ckpt_fast.checkpointing import GlobalState
config: Any
context: dict[str, Any]
directory: str
model: Any
optimizer: Any
scheduler: Any
state: GlobalState
state_dict: dict[str, Any]
steps: int
train: Any
train_iterator: Any
"""
WITHOUT_TYPES = ("megatron", "nvidia_resiliency_ext", "multistorageclient", "modelopt", "nvtx", "yaml")
# Those of them that snippets import from; their values are anything.
WITHOUT_TYPES_IN_SNIPPETS = (
    "megatron.core",
    "megatron.core.msc_utils",
    "megatron.bridge.utils.instantiate_utils",
)


def snippets() -> Iterator[tuple[str, str]]:
    """Yield (name, code) of each snippet, which imports what it is given."""
    for document in DOCUMENTS:
        for number, code in enumerate(FENCE.findall(document.read_text()), 1):
            given = ", ".join(names_given_to(code))
            first = f"from given import {given}\n" if given else ""
            yield f"{document.stem.lower().replace('-', '_')}_{number}.py", first + code


def names_given_to(code: str) -> list[str]:
    """Return the names that a snippet uses and does not define."""
    nodes = list(ast.walk(ast.parse(code)))
    names = [node for node in nodes if isinstance(node, ast.Name)]
    defined = {name.id for name in names if isinstance(name.ctx, ast.Store)}
    parameters = {node.arg for node in nodes if isinstance(node, ast.arg)}
    given = {*re.findall(r"^(\w+):", GIVEN, re.M)}
    return sorted({name.id for name in names} & given - defined - parameters)


def build(library: Path) -> None:
    """Put into a folder what a wheel has of Python."""
    command = [sys.executable, "setup.py", "--quiet", "build_py", "--build-lib", str(library)]
    subprocess.run(command, cwd=ROOT, check=True)
    if not (library / "ckpt_fast" / "py.typed").is_file():
        raise SystemExit("the wheel would have no py.typed: its types would not reach anyone")


def require_installed(python: str, place: Path) -> None:
    """The interpreter has the package, with its types, and not as this checkout."""
    code = "import importlib.util as util; found = util.find_spec('ckpt_fast'); print(found and found.origin)"
    ran = subprocess.run([python, "-I", "-c", code], cwd=place, check=True, capture_output=True, text=True)
    package = Path(ran.stdout.strip()).parent
    if not (package / "py.typed").is_file():
        raise SystemExit(f"{python} has no ckpt_fast with types: pip install one of the wheels")
    if package.resolve().parent == ROOT:
        raise SystemExit(f"ckpt_fast of {python} is this checkout ({package}), not an installed wheel")


def mypy(folder: Path, python: str | None) -> list[str]:
    sections = "".join(
        f"[mypy-{name}.*]\nignore_missing_imports = true\nfollow_imports = skip\n" for name in WITHOUT_TYPES
    )
    # torch does not list what torch.distributed.checkpoint is documented to have.
    sections += "[mypy-torch.*]\nimplicit_reexport = true\n"
    (folder / "mypy.ini").write_text(f"[mypy]\nstrict = true\n{sections}")
    # What it remembers of an installation is of no use for another.
    cache = folder.parent / "cache" if python else ROOT / ".mypy_cache" / "snippets"
    options = ["--config-file", "mypy.ini", "--cache-dir", str(cache)]
    return [sys.executable, "-m", "mypy", *options, "--python-executable", python or sys.executable, "."]


def pyright(folder: Path, python: str | None) -> list[str]:
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
    found = next(filter(None, (shutil.which(name, path=path) for name in ("pyright", "basedpyright"))), None)
    if found is None:
        raise SystemExit("there is no pyright: pip install basedpyright")
    for module in WITHOUT_TYPES_IN_SNIPPETS:
        stub = folder / "typings" / module.replace(".", "/") / "__init__.pyi"
        stub.parent.mkdir(parents=True, exist_ok=True)
        stub.write_text("from typing import Any\ndef __getattr__(name: str) -> Any: ...\n")
    settings = {
        "typeCheckingMode": "strict",
        # Of torch's: some parameters have no complete types, and dcp.save is not listed as exported.
        "reportUnknownMemberType": False,
        "reportPrivateImportUsage": False,
        "reportMissingModuleSource": False,
        "extraPaths": [] if python else [str(folder.parent / "library")],
        "exclude": ["typings"],
    }
    (folder / "pyrightconfig.json").write_text(json.dumps(settings))
    return [found, "--pythonpath", python or sys.executable, "."]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pyright", action="store_true", help="pyright instead of mypy")
    parser.add_argument("--python", metavar="PATH", help="an interpreter with the wheel; not this checkout")
    options = parser.parse_args()
    checker = pyright if options.pyright else mypy
    with tempfile.TemporaryDirectory(prefix="snippets_") as temporary:
        library, folder = Path(temporary, "library"), Path(temporary, "code")
        folder.mkdir()
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        python = None
        if options.python:
            python = str(Path(options.python).absolute())  # not resolved: the link is what makes it a venv's
            require_installed(python, folder)
        else:
            build(library)
            environment["PYTHONPATH"] = str(library)
        (folder / "given.pyi").write_text(GIVEN)
        for name, code in snippets():
            (folder / name).write_text(code)
        command = checker(folder, python)
        return subprocess.run(command, cwd=folder, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
