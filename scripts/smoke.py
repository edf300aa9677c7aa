# SPDX-License-Identifier: Apache-2.0
"""Install what was built in bare environments, and use it there: ``make smoke``.

    python scripts/smoke.py [--torch VERSION]... PYTHON...

For every PYTHON, and every VERSION of torch, a new environment outside the repository gets torch and then,
one in place of the other, what is in ``dist`` for this Python and processor: the wheel with the engine, the
one with the CUDA part if there is one, the one in pure Python, and the sdist, which pip builds where no
compiler is on PATH. Each is imported, saves, loads, and is asked by its command line. Last, the snippets in
README and docs are checked against the wheel with the engine, by mypy and basedpyright, which the environment
gets for it.
"""

from __future__ import annotations

import argparse
import os
import platform
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DIST = ROOT / "dist"
RELEASE = runpy.run_path(str(ROOT / "ckpt_fast" / "version.py"))["RELEASE"]
ENGINE, CUDA, PURE, SOURCES = "engine", "engine and CUDA", "pure Python", "sdist without a compiler"
USE = """
import os, sys, time
begin = time.perf_counter()
import torch, ckpt_fast
from ckpt_fast import native
imported = time.perf_counter()
state = {"weight": torch.randn(1000, 1000), "step": 7}
ckpt_fast.save(state, sys.argv[1], no_dist=True)
saved = time.perf_counter()
into = {"weight": torch.zeros(1000, 1000), "step": 0}
ckpt_fast.load(into, sys.argv[1], no_dist=True)
loaded = time.perf_counter()
assert into["step"] == 7 and torch.equal(into["weight"], state["weight"])
assert not os.path.abspath(ckpt_fast.__file__).startswith(sys.argv[2]), ckpt_fast.__file__
found = native.engine().__name__ == "ckpt_fast.native._engine", native.cuda_release() is not None
assert found == ("engine" in sys.argv[3], "CUDA" in sys.argv[3]), found
print(f"Python {sys.version.split()[0]}, torch {torch.__version__}, ckpt_fast {ckpt_fast.__version__}, "
      f"{sys.argv[3]}: import {imported - begin:.1f} s, save {saved - imported:.3f} s, "
      f"load {loaded - saved:.3f} s")
"""


def run(*command: str | Path, place: Path, path: str | Path | None = None) -> str:
    """Return what a command prints, which must succeed; ``path`` replaces PATH."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if path is not None:
        environment = {name: value for name, value in environment.items() if name not in ("CC", "CXX")}
        environment["PATH"] = str(path)
    words = list(map(str, command))
    done = subprocess.run(words, cwd=place, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(words)} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def packages_for(python: str) -> Iterator[tuple[str, Path]]:
    """Yield (kind, file) of each package in ``dist`` for an interpreter on this machine."""
    code = "import sys; print('cp%d%d' % sys.version_info[:2])"
    tag = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip()
    compiled = f"{tag}-{tag}-manylinux*_{platform.machine()}.whl"
    for kind, pattern in (
        (ENGINE, f"ckpt_fast-{RELEASE}-{compiled}"),
        (CUDA, f"ckpt_fast-{RELEASE}+cu*-{compiled}"),
        (PURE, f"ckpt_fast-{RELEASE}-py3-none-any.whl"),
        (SOURCES, f"ckpt_fast-{RELEASE}.tar.gz"),
    ):
        found = sorted(DIST.glob(pattern))
        if len(found) == 1:
            yield kind, found[0]
        elif found or kind != CUDA:
            raise SystemExit(f"dist has {len(found)} of {pattern}; `make wheels` builds one for {python}")


def smoke(python: str, torch: str | None, place: Path) -> None:
    """Use everything in one new environment below ``place``."""
    packages = dict(packages_for(python))
    begin = time.perf_counter()
    run(python, "-m", "venv", place / "bare", place=place)
    installed = place / "bare" / "bin"
    pip = (installed / "python", "-m", "pip")
    run(*pip, "install", "--quiet", f"torch=={torch}" if torch else "torch", place=place)
    print(f"{python}: torch is there after {time.perf_counter() - begin:.0f} s", flush=True)
    for kind, package in packages.items():
        if kind == SOURCES:
            # pip's cache would give what it once built from a file of this name.
            run(*pip, "install", "--quiet", "--no-cache-dir", package, place=place, path=installed)
        else:
            run(*pip, "install", "--quiet", package, place=place)
        directory = place / kind.replace(" ", "-")
        said = run(installed / "python", "-W", "ignore", "-I", "-c", USE, directory, ROOT, kind, place=place)
        run(installed / "ckpt-fast", "inspect", directory, place=place)
        run(installed / "ckpt-fast", "verify", directory, "--deep", place=place)
        print(f"  {said.strip()}", flush=True)
        run(*pip, "uninstall", "--quiet", "--yes", "ckpt_fast", place=place)
    begin = time.perf_counter()
    pinned = [word for name in ("dev", "pyright") for word in ("-c", ROOT / "requirements" / f"{name}.txt")]
    run(*pip, "install", "--quiet", "mypy", "basedpyright", *pinned, packages[ENGINE], place=place)
    check = (installed / "python", ROOT / "scripts" / "check_snippets.py", "--python", installed / "python")
    for checker, options in (("mypy", ()), ("basedpyright", ("--pyright",))):
        said = run(*check, *options, place=place).strip()
        print(f"  {checker}: {said} ({time.perf_counter() - begin:.0f} s)", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Use what is in dist in bare environments.")
    parser.add_argument(
        "--torch", action="append", help="its version, or several; by default the newest that pip finds"
    )
    parser.add_argument("pythons", nargs="+", metavar="PYTHON")
    arguments = parser.parse_args()
    for python in arguments.pythons:
        for torch in arguments.torch or [None]:
            with tempfile.TemporaryDirectory(prefix="ckpt_fast-smoke-") as place:
                smoke(python, torch, Path(place))


if __name__ == "__main__":
    sys.exit(main())
