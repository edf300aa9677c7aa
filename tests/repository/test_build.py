# SPDX-License-Identifier: Apache-2.0
"""What ``setup.py`` builds from a source tree, with compilers that only create their outputs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from ckpt_fast.version import RELEASE

ROOT = Path(__file__).resolve().parents[2]
COMPILER = """#!/bin/sh
case "$1" in
--version) echo "Cuda compilation tools, release 12.8, V12.8.93"; exit ;;
--list-gpu-arch) echo compute_90; exit ;;
esac
while [ "$1" != -o ]; do shift; done
echo compiled > "$2"
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Return a copy of the sources, with fake compilers beside it."""
    tree = tmp_path / "tree"
    not_sources = shutil.ignore_patterns("*.so", "__pycache__")
    for folder in ("ckpt_fast", "csrc"):
        shutil.copytree(ROOT / folder, tree / folder, ignore=not_sources)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, tree)
    (tmp_path / "bin").mkdir()
    for name in ("nvcc", "c++"):
        (tmp_path / "bin" / name).write_text(COMPILER)
        (tmp_path / "bin" / name).chmod(0o755)
    return tree


def setup(tree: Path, *arguments: str, cuda: bool) -> str:
    """Run ``setup.py``; return what it printed."""
    path = os.pathsep.join([str(tree.parent / "bin"), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "CXX": "c++"}
    environment.pop("CKPT_FAST_CUDA", None)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "setup.py", *arguments],
        cwd=tree,
        env=environment if cuda else {**environment, "CKPT_FAST_CUDA": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(("cuda", "version"), [(True, f"{RELEASE}+cu128"), (False, RELEASE)])
def test_the_version_names_the_cuda_of_the_build(tree: Path, cuda: bool, version: str) -> None:
    assert setup(tree, "--version", cuda=cuda).strip() == version


def test_wheels_with_and_without_cuda_differ_in_name_and_content(tree: Path) -> None:
    """From one tree, with CUDA first: the second takes nothing from the first."""
    contents = {}
    for cuda in (True, False):
        setup(tree, "--quiet", "bdist_wheel", "--dist-dir", str(tree.parent / f"wheel-{cuda}"), cuda=cuda)
        (wheel,) = (tree.parent / f"wheel-{cuda}").iterdir()
        names = zipfile.ZipFile(wheel).namelist()
        assert {"ckpt_fast/py.typed", "ckpt_fast/native/_engine.pyi"} <= set(names), "no types for its users"
        contents[wheel.name.split("-")[1]] = {
            Path(name).name.split(".")[0] for name in names if name.endswith(".so")
        }
    assert contents == {f"{RELEASE}+cu128": {"_engine", "_cuda"}, RELEASE: {"_engine"}}


def test_a_build_without_cuda_leaves_what_lies_in_the_source_tree(tree: Path) -> None:
    for cuda in (True, False):
        setup(tree, "--quiet", "build_ext", "--inplace", cuda=cuda)
        built = {path.name.split(".")[0] for path in (tree / "ckpt_fast" / "native").glob("*.so")}
        assert built == {"_engine", "_cuda"}


def test_an_sdist_has_no_cuda_version(tree: Path) -> None:
    setup(tree, "--quiet", "sdist", cuda=True)
    assert [path.name for path in (tree / "dist").iterdir()] == [f"ckpt_fast-{RELEASE}.tar.gz"]
    shutil.unpack_archive(tree / "dist" / f"ckpt_fast-{RELEASE}.tar.gz", tree.parent)
    unpacked = tree.parent / f"ckpt_fast-{RELEASE}"
    assert setup(unpacked, "--version", cuda=True).strip() == RELEASE, "pip refuses another than the sdist's"
