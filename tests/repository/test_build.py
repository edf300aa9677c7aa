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
    for folder in ("ckpt_fast", "csrc", "licenses"):
        shutil.copytree(ROOT / folder, tree / folder, ignore=not_sources)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in", "CHANGELOG.md"):
        shutil.copy(ROOT / name, tree)
    (tmp_path / "bin").mkdir()
    for name in ("nvcc", "c++"):
        (tmp_path / "bin" / name).write_text(COMPILER)
        (tmp_path / "bin" / name).chmod(0o755)
    return tree


def run_setup(tree: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run ``setup.py`` with the fake compilers on the path, and the variables of a build as they are here."""
    path = os.pathsep.join([str(tree.parent / "bin"), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path}
    for name in ("CKPT_FAST_CUDA", "CKPT_FAST_CUDA_LINK", "CKPT_FAST_NATIVE", "CXX"):
        environment.pop(name, None)
    return subprocess.run(
        [sys.executable, "-W", "ignore", "setup.py", *arguments],
        cwd=tree,
        env={**environment, **variables},
        capture_output=True,
        text=True,
        check=False,
    )


def setup(tree: Path, *arguments: str, cuda: bool = True, **variables: str) -> str:
    """``run_setup``, which succeeds; return what it printed."""
    if not cuda:
        variables["CKPT_FAST_CUDA"] = "0"
    done = run_setup(tree, *arguments, **variables)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


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


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({"PATH": ""}, "no C++ compiler (c++) on PATH"),
        ({"CKPT_FAST_NATIVE": "0"}, "CKPT_FAST_NATIVE=0"),
    ],
)
def test_without_a_compiler_the_wheel_is_pure_python(
    tree: Path, variables: dict[str, str], reason: str
) -> None:
    """From a tree where it was compiled before, and which says why in one line."""
    setup(tree, "--quiet", "build_ext", "--inplace")
    setup(tree, "--quiet", "bdist_wheel", "--dist-dir", str(tree.parent / "compiled"))
    printed = setup(tree, "--quiet", "bdist_wheel", "--dist-dir", str(tree.parent / "pure"), **variables)
    said = [line for line in printed.splitlines() if line.startswith("ckpt_fast: ")]
    assert said == [f"ckpt_fast: building in pure Python, slower than with the engine: {reason}"]
    (wheel,) = (tree.parent / "pure").iterdir()
    assert wheel.name == f"ckpt_fast-{RELEASE}-py3-none-any.whl"
    names = zipfile.ZipFile(wheel).namelist()
    assert "ckpt_fast/native/fallback.py" in names
    assert [name for name in names if name.endswith(".so")] == []


def test_a_compiler_that_was_asked_for_must_be_there(tree: Path) -> None:
    ran = run_setup(tree, "--version", CXX="no-such-compiler -O2")
    assert ran.returncode != 0
    assert "there is no CXX=no-such-compiler -O2; CKPT_FAST_NATIVE=0 builds without one" in ran.stderr


def test_the_compiler_may_be_a_command_with_arguments(tree: Path) -> None:
    shutil.copy(tree.parent / "bin" / "c++", tree.parent / "bin" / "ccache")
    setup(tree, "--quiet", "build_ext", "--inplace", CXX="ccache c++ -m64")
    assert "c++ -m64" in next((tree / "build").glob("ninja*/build.ninja")).read_text()
    assert list((tree / "ckpt_fast" / "native").glob("_engine.*.so")) != []


def test_the_cuda_part_is_linked_by_the_command_that_was_asked_for(tree: Path) -> None:
    shutil.copy(tree.parent / "bin" / "c++", tree.parent / "bin" / "linker")
    setup(tree, "--quiet", "build_ext", "--inplace", CKPT_FAST_CUDA_LINK="linker -shared 'a folder/old.a'")
    rules = next((tree / "build").glob("ninja*/build.ninja")).read_text()
    assert "command = linker -shared 'a folder/old.a' $in -o $out" in rules
    assert "nvcc -shared" not in rules
    assert list((tree / "ckpt_fast" / "native").glob("_cuda.*.so")) != []


def test_an_sdist_has_no_cuda_version(tree: Path) -> None:
    setup(tree, "--quiet", "sdist", cuda=True)
    assert [path.name for path in (tree / "dist").iterdir()] == [f"ckpt_fast-{RELEASE}.tar.gz"]
    shutil.unpack_archive(tree / "dist" / f"ckpt_fast-{RELEASE}.tar.gz", tree.parent)
    unpacked = tree.parent / f"ckpt_fast-{RELEASE}"
    assert setup(unpacked, "--version", cuda=True).strip() == RELEASE, "pip refuses another than the sdist's"


def test_the_number_of_jobs_is_the_builds_own_choice(tree: Path) -> None:
    """As that of torch's extensions: ninja refuses what is not a number."""
    ran = run_setup(tree, "--quiet", "build_ext", "--inplace", MAX_JOBS="few")
    assert ran.returncode != 0
    assert "invalid -j parameter" in ran.stderr
    assert run_setup(tree, "--quiet", "build_ext", "--inplace", MAX_JOBS="1").returncode == 0
