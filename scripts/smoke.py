# SPDX-License-Identifier: Apache-2.0
"""Install built wheels in bare environments, and use them there: ``make smoke``.

    python scripts/smoke.py [--torch VERSION] PYTHON...

For every PYTHON, a new environment outside the repository gets torch and the wheel in ``dist`` for this
Python and processor; then the one in pure Python in its place. Each is imported, saves, loads, and is asked
by its command line.
"""

from __future__ import annotations

import argparse
import platform
import runpy
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RELEASE = runpy.run_path(str(ROOT / "ckpt_fast" / "version.py"))["RELEASE"]
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
assert (native.engine().__name__ == "ckpt_fast.native._engine") == (sys.argv[3] == "engine")
print(f"Python {sys.version.split()[0]}, torch {torch.__version__}, ckpt_fast {ckpt_fast.__version__}, "
      f"{sys.argv[3]}: import {imported - begin:.1f} s, save {saved - imported:.3f} s, "
      f"load {loaded - saved:.3f} s")
"""


def run(*command: str | Path, place: Path) -> str:
    done = subprocess.run(list(map(str, command)), cwd=place, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(map(str, command))} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def wheel_for(python: str) -> Path:
    """Return the wheel without CUDA for an interpreter on this machine."""
    code = "import sys; print('cp%d%d' % sys.version_info[:2])"
    tag = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip()
    pattern = f"ckpt_fast-{RELEASE}-{tag}-{tag}-manylinux*_{platform.machine()}.whl"
    found = sorted((ROOT / "dist").glob(pattern))
    if len(found) != 1:
        raise SystemExit(f"there is no dist/{pattern}: `make wheels` builds it, if it finds {python}")
    return found[0]


def smoke(python: str, torch: str | None, place: Path) -> None:
    begin = time.perf_counter()
    run(python, "-m", "venv", place / "bare", place=place)
    installed = place / "bare" / "bin"
    pip = (installed / "python", "-m", "pip", "install", "--quiet")
    if torch is not None:
        run(*pip, f"torch=={torch}", place=place)
    pure = ROOT / "dist" / f"ckpt_fast-{RELEASE}-py3-none-any.whl"
    for kind, wheel in (("engine", wheel_for(python)), ("pure Python", pure)):
        run(*pip, wheel, place=place)
        directory = place / kind
        said = run(installed / "python", "-W", "ignore", "-I", "-c", USE, directory, ROOT, kind, place=place)
        run(installed / "ckpt-fast", "inspect", directory, place=place)
        run(installed / "ckpt-fast", "verify", directory, "--deep", place=place)
        print(said.strip(), flush=True)
        run(installed / "python", "-m", "pip", "uninstall", "--quiet", "--yes", "ckpt_fast", place=place)
    print(f"  {python}: {time.perf_counter() - begin:.0f} s, most of it to install torch", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Use the wheels in dist in bare environments.")
    parser.add_argument("--torch", help="its version; by default the newest that pip finds")
    parser.add_argument("pythons", nargs="+", metavar="PYTHON")
    arguments = parser.parse_args()
    for python in arguments.pythons:
        with tempfile.TemporaryDirectory(prefix="ckpt_fast-smoke-") as place:
            smoke(python, arguments.torch, Path(place))


if __name__ == "__main__":
    sys.exit(main())
