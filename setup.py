# SPDX-License-Identifier: Apache-2.0
"""Builds the two extension modules with ninja: ``_engine`` on Linux with a compiler, ``_cuda`` with nvcc too.

Without a compiler, with ``CKPT_FAST_NATIVE=0``, and on other systems, the build is pure Python: the engine's
twin does the same, only slower. ``CXX`` chooses the compiler ("ccache g++").

``CKPT_FAST_CUDA=0`` leaves ``_cuda`` out; ``CKPT_FAST_CUDA_ARCHS`` ("80;90;100") chooses its GPU
architectures, the last of which is also included as PTX for later GPUs, and ``CKPT_FAST_CUDA_LINK`` a command
that links it in place of nvcc. ``MAX_JOBS`` limits how many files are compiled at a time. The version of a
build names the CUDA release of its ``_cuda`` ("0.1.0+cu130"); an sdist names none.
"""

from __future__ import annotations

import logging
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
from glob import glob
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
ENGINE = "ckpt_fast.native._engine"
CUDA = "ckpt_fast.native._cuda"
SOURCES = {
    ENGINE: [
        *sorted(glob("csrc/engine/*/*.cc", root_dir=ROOT)),
        "csrc/python/engine_module.cc",
        "csrc/python/describe_tensors.cc",
        "csrc/python/inventory.cc",
    ],
    CUDA: [*sorted(glob("csrc/cuda/*.cu", root_dir=ROOT)), "csrc/python/cuda_module.cc"],
}


def find_compiler() -> tuple[str | None, str]:
    """Return the C++ compiler for ``_engine``, or None and the reason why nothing native is built."""
    if os.environ.get("CKPT_FAST_NATIVE") == "0":
        return None, "CKPT_FAST_NATIVE=0"
    if sys.platform != "linux":
        return None, "the engine is for Linux"
    compiler = os.environ.get("CXX") or "c++"
    if shutil.which(shlex.split(compiler)[0]) is None:
        if os.environ.get("CXX"):
            raise SystemExit(f"ckpt_fast: there is no CXX={compiler}; CKPT_FAST_NATIVE=0 builds without one")
        return None, "no C++ compiler (c++) on PATH"
    headers = Path(sysconfig.get_path("include"))
    if not (headers / "Python.h").exists():
        return None, f"no Python.h in {headers} (Debian: python3-dev)"
    return compiler, ""


def find_nvcc() -> tuple[str | None, str]:
    """Return the nvcc to build ``_cuda`` with, or None and the reason why it is left out."""
    if find_compiler()[0] is None:
        return None, "nothing native is built"
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


def write_ninja_file(path: Path, extensions: list[str], compiler: str, nvcc: str | None) -> None:
    """Write the build graph of ``extensions``; objects and libraries go next to ``path``."""
    import pybind11
    from ninja.ninja_syntax import Writer

    includes = [f"-isystem {sysconfig.get_path('include')}", f"-isystem {pybind11.get_include()}"]
    # What a binary says of its sources must not name this machine's folders.
    own, foreign = (
        f"-ffile-prefix-map={folder}={name}"
        for folder, name in ((ROOT, "ckpt_fast"), (pybind11.get_include(), "pybind11"))
    )
    host = ["-fPIC", "-fvisibility=hidden", "-pthread", own, *os.environ.get("CXXFLAGS", "").split()]
    common = ["-std=c++17", "-O3", "-DNDEBUG", f"-I{ROOT / 'csrc'}"]
    with path.open("w") as file:
        ninja = Writer(file, width=110)
        ninja.variable("cxx", compiler)
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
            linker = os.environ.get("CKPT_FAST_CUDA_LINK") or "$nvcc -shared -cudart=static"
            ninja.rule("link_cuda", f"{linker} $in -o $out", "link $out")
        for name in extensions:
            suffix = "_cuda" if name == CUDA else ""
            objects = [f"{name}/{source}.o" for source in SOURCES[name]]
            for source, output in zip(SOURCES[name], objects, strict=True):
                # Only modules see Python and pybind11, whose folder changes with every isolated build.
                hidden = f"-Xcompiler={foreign}" if name == CUDA else foreign
                seen = {"includes": [*includes, hidden]} if source.startswith("csrc/python/") else None
                ninja.build(output, f"compile{suffix}", str(ROOT / source), variables=seen)
            ninja.build(f"{name}.so", f"link{suffix}", objects)


class NinjaBuild(build_ext):
    """Compiles all extensions in one parallel, incremental ninja run."""

    def build_extensions(self) -> None:
        (compiler, _), (nvcc, reason) = find_compiler(), find_nvcc()
        assert compiler is not None, "there are no extensions without a compiler"
        names = [extension.name for extension in self.extensions]
        if CUDA not in names:
            self.announce(f"ckpt_fast: building without CUDA: {reason}", level=logging.WARNING)
            # Keep a module of an earlier build out of the wheel; one in the source tree stays.
            (Path(self.build_lib) / self.get_ext_filename(CUDA)).unlink(missing_ok=True)
        # One folder per Python: interpreters side by side share a checkout but no object files.
        folder = ROOT / "build" / Path(self.get_ext_filename("ninja")).stem
        folder.mkdir(parents=True, exist_ok=True)
        write_ninja_file(folder / "build.ninja", names, compiler, nvcc if CUDA in names else None)
        from ninja import BIN_DIR

        # BIN_DIR is empty if ninja is only on PATH, as in pip's isolated builds.
        command = [os.path.join(BIN_DIR, "ninja"), "-C", str(folder)]
        if os.environ.get("MAX_JOBS"):
            command += ["-j", os.environ["MAX_JOBS"]]
        if subprocess.run(command, check=False).returncode != 0:
            part = "CKPT_FAST_CUDA=0 builds without its CUDA part, and " if CUDA in names else ""
            raise SystemExit(
                f"ckpt_fast: the native build failed, see above; {part}CKPT_FAST_NATIVE=0 in pure Python"
            )
        for name in names:
            target = Path(self.get_ext_fullpath(name))
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(folder / f"{name}.so", target)


class PythonBuild(build_py):
    """Says why nothing is compiled, if that is so."""

    def run(self) -> None:
        compiler, reason = find_compiler()
        if compiler is None:
            text = f"ckpt_fast: building in pure Python, slower than with the engine: {reason}"
            self.announce(text, level=logging.WARNING)
        super().run()


FOUND = {ENGINE: find_compiler()[0], CUDA: find_nvcc()[0]}
setup(
    version=version(),
    ext_modules=[Extension(name, SOURCES[name]) for name, found in FOUND.items() if found],
    cmdclass={"build_ext": NinjaBuild, "build_py": PythonBuild},
)
