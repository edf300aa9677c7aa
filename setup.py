# SPDX-License-Identifier: Apache-2.0
"""Builds the two extension modules with ninja: ``_engine`` always, ``_cuda`` if nvcc is found.

``CKPT_FAST_CUDA=0`` leaves ``_cuda`` out; ``CKPT_FAST_CUDA_ARCHS`` ("80;90;100") chooses its GPU
architectures, the last of which is also included as PTX for later GPUs. The version of a build names
the CUDA release of its ``_cuda`` ("0.1.0+cu130"); an sdist names none.
"""

from __future__ import annotations

import logging
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
from glob import glob
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
ENGINE = "ckpt_fast.native._engine"
CUDA = "ckpt_fast.native._cuda"
SOURCES = {
    ENGINE: [
        *sorted(glob("csrc/engine/*/*.cc", root_dir=ROOT)),
        "csrc/python/engine_module.cc",
        "csrc/python/describe_tensors.cc",
        "csrc/python/walk_modules.cc",
    ],
    CUDA: [*sorted(glob("csrc/cuda/*.cu", root_dir=ROOT)), "csrc/python/cuda_module.cc"],
}


def find_nvcc() -> tuple[str | None, str]:
    """Return the nvcc to build ``_cuda`` with, or None and the reason why it is left out."""
    if os.environ.get("CKPT_FAST_CUDA") == "0":
        return None, "CKPT_FAST_CUDA=0"
    if len(SOURCES[CUDA]) < 2 or not (ROOT / SOURCES[CUDA][-1]).exists():
        return None, "no sources in csrc/cuda"
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    path = os.pathsep.join([os.environ.get("PATH", ""), *(f"{home}/bin" for home in homes if home)])
    nvcc = shutil.which("nvcc", path=path)
    return nvcc, "" if nvcc else "no nvcc on PATH or in CUDA_HOME"


def version() -> str:
    """Return the version of this build."""
    of_package = runpy.run_path(str(ROOT / "ckpt_fast" / "version.py"))
    nvcc, _ = find_nvcc()
    # A build from an sdist keeps the sdist's version: pip refuses any other.
    if nvcc is None or "sdist" in sys.argv or (ROOT / "PKG-INFO").exists():
        return str(of_package["build_version"](None))
    said = subprocess.run([nvcc, "--version"], check=True, capture_output=True, text=True).stdout
    found = re.search(r"release (\d+)\.(\d+)", said)
    if found is None:
        raise SystemExit(f"ckpt_fast: {nvcc} --version names no release:\n{said}")
    return str(of_package["build_version"](found.groups()))


def gencode_flags(nvcc: str) -> list[str]:
    """Return the flags for machine code of each chosen architecture, and PTX of the last."""
    chosen = os.environ.get("CKPT_FAST_CUDA_ARCHS")
    if chosen:
        archs = chosen.replace(",", ";").split(";")
    else:
        listed = subprocess.run([nvcc, "--list-gpu-arch"], check=True, capture_output=True, text=True)
        archs = [arch for arch in ("80", "90", "100") if f"compute_{arch}" in listed.stdout.split()]
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    return [*flags, f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}"]


def write_ninja_file(path: Path, extensions: list[str], nvcc: str | None) -> None:
    """Write the build graph of ``extensions``; objects and libraries go next to ``path``."""
    import pybind11
    from ninja.ninja_syntax import Writer

    includes = [f"-isystem {sysconfig.get_path('include')}", f"-isystem {pybind11.get_include()}"]
    host = ["-fPIC", "-fvisibility=hidden", "-pthread", *os.environ.get("CXXFLAGS", "").split()]
    common = ["-std=c++17", "-O3", "-DNDEBUG", f"-I{ROOT / 'csrc'}"]
    with path.open("w") as file:
        ninja = Writer(file, width=110)
        ninja.variable("cxx", os.environ.get("CXX", "c++"))
        ninja.variable("cxxflags", [*common, "-Wall", "-Wextra", *host])
        ninja.variable("ldflags", ["-pthread", *os.environ.get("LDFLAGS", "").split()])
        to_object = "$includes -MMD -MF $out.d -c $in -o $out"
        deps = {"depfile": "$out.d", "deps": "gcc"}
        ninja.rule("compile", f"$cxx $cxxflags {to_object}", "compile $in", **deps)
        ninja.rule("link", "$cxx -shared $in -o $out $ldflags", "link $out")
        if nvcc:
            ninja.variable("nvcc", nvcc)
            ninja.variable("cudaflags", [*common, f"-Xcompiler={','.join(host)}", *gencode_flags(nvcc)])
            ninja.rule("compile_cuda", f"$nvcc $cudaflags {to_object}", "nvcc $in", **deps)
            ninja.rule("link_cuda", "$nvcc -shared -cudart=static $in -o $out", "link $out")
        for name in extensions:
            suffix = "_cuda" if name == CUDA else ""
            objects = [f"{name}/{source}.o" for source in SOURCES[name]]
            for source, output in zip(SOURCES[name], objects, strict=True):
                # Only modules see Python and pybind11, whose folder changes with every isolated build.
                seen = {"includes": includes} if source.startswith("csrc/python/") else None
                ninja.build(output, f"compile{suffix}", str(ROOT / source), variables=seen)
            ninja.build(f"{name}.so", f"link{suffix}", objects)


class NinjaBuild(build_ext):
    """Compiles all extensions in one parallel, incremental ninja run."""

    def build_extensions(self) -> None:
        nvcc, reason = find_nvcc()
        names = [extension.name for extension in self.extensions]
        if CUDA not in names:
            self.announce(f"ckpt_fast: building without CUDA: {reason}", level=logging.WARNING)
            # Keep a module of an earlier build out of the wheel; one in the source tree stays.
            (Path(self.build_lib) / self.get_ext_filename(CUDA)).unlink(missing_ok=True)
        # One folder per Python: interpreters side by side share a checkout but no object files.
        folder = ROOT / "build" / f"ninja-{sysconfig.get_config_var('SOABI')}"
        folder.mkdir(parents=True, exist_ok=True)
        write_ninja_file(folder / "build.ninja", names, nvcc if CUDA in names else None)
        from ninja import BIN_DIR

        # BIN_DIR is empty if ninja is only on PATH, as in pip's isolated builds.
        if subprocess.run([os.path.join(BIN_DIR, "ninja"), "-C", str(folder)], check=False).returncode != 0:
            hint = "; CKPT_FAST_CUDA=0 builds without its CUDA part" if CUDA in names else ""
            raise SystemExit(f"ckpt_fast: the native build failed, see above{hint}")
        for name in names:
            target = Path(self.get_ext_fullpath(name))
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(folder / f"{name}.so", target)


BUILT = [ENGINE, CUDA] if find_nvcc()[0] else [ENGINE]
setup(
    version=version(),
    ext_modules=[Extension(name, SOURCES[name]) for name in BUILT],
    cmdclass={"build_ext": NinjaBuild},
)
