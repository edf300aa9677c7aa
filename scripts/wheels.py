# SPDX-License-Identifier: Apache-2.0
"""Build the sdist and, from it, all wheels: ``make wheels``.

    python scripts/wheels.py [--processor NAME]... --tools DIRECTORY PYTHON...

In ``dist``: one wheel in pure Python for every system; for Linux, each PYTHON, and x86-64 and aarch64, one
with the engine; for this machine's processor, if nvcc is found, one with the engine and the CUDA part, whose
version names it.

Zig compiles the engine and links all modules, for glibc 2.28, as torch's own wheels are. nvcc and g++ compile
the CUDA part. Every module is checked: what it needs from the system, and that it names no folder of this
machine.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from elftools.elf.dynamic import DynamicSection
from elftools.elf.elffile import ELFFile
from elftools.elf.gnuversions import GNUVerNeedSection

ROOT = Path(__file__).resolve().parent.parent
DIST = ROOT / "dist"
GLIBC = "2.28"
PROCESSORS = ("x86_64", "aarch64")
LIBRARIES = re.compile(r"(libc|libm|libdl|librt|libpthread|libgcc_s)\.so\.\d|ld-linux-\w+(-\w+)?\.so\.\d")
EXPORTS = "{ global: PyInit_*; local: *; };"
# glibc has had it since 2.32. What newer compilers' headers and library ask of it: there may be threads.
NEWER = "extern char __libc_single_threaded; char __libc_single_threaded = 0;"
PYTHON_FACTS = "import sys, sysconfig; print(*sys.version_info[:2], sysconfig.get_config_var('SOABI'))"


@dataclass(frozen=True)
class Python:
    """An interpreter to build for."""

    path: str
    version: str
    soabi: str

    @staticmethod
    def at(path: str) -> Python:
        said = subprocess.run([path, "-c", PYTHON_FACTS], check=True, capture_output=True, text=True).stdout
        major, minor, soabi = said.split()
        return Python(path, f"{major}.{minor}", soabi)


class Builder:
    """Runs ``setup.py`` of an unpacked sdist.

    Args:
        sdist: the archive.
        place: an empty directory.
        tools: where setuptools, pybind11, ninja and ziglang are installed for any interpreter.
    """

    def __init__(self, sdist: Path, place: Path, tools: Path) -> None:
        self._place, self._tools = place, tools
        with tarfile.open(sdist) as archive:
            archive.extractall(place, filter="data")
        (self._tree,) = place.iterdir()
        exports = place / "exports.map"
        exports.write_text(EXPORTS)
        self._exports = f"-Wl,--version-script={exports}"
        # A build that names its CUDA is not the sdist's version.
        (self._tree / "PKG-INFO").unlink()

    def pure(self, python: Python) -> Path:
        """Build the wheel without compiled modules."""
        return self._wheel(python, [], CKPT_FAST_NATIVE="0")

    def engine(self, python: Python, processor: str) -> Path:
        """Build the wheel with the engine for a processor."""
        return self._portable(python, processor, CKPT_FAST_CUDA="0")

    def cuda(self, python: Python, nvcc: str) -> Path:
        """Build the wheel with engine and CUDA part for this machine's processor."""
        processor = platform.machine()
        return self._portable(python, processor, CKPT_FAST_CUDA_LINK=self._cuda_link(nvcc, processor))

    def _portable(self, python: Python, processor: str, **variables: str) -> Path:
        """Build by Zig, for an old glibc."""
        wheel = self._wheel(
            python,
            ["--plat-name", f"manylinux_{GLIBC.replace('.', '_')}_{processor}"],
            processor,
            CXX=self._zig(processor),
            CXXFLAGS=self._debians_headers(python, processor),
            LDFLAGS=self._exports,
            SETUPTOOLS_EXT_SUFFIX=f".{python.soabi.replace(platform.machine(), processor)}.so",
            **variables,
        )
        self._require_portable(wheel, processor)
        return wheel

    def _debians_headers(self, python: Python, processor: str) -> str:
        """Return the option with which Zig finds what Debian's Pythons include from a folder of the system's.

        Zig does not search that folder, and must not: this machine's glibc is there, too.
        """
        folder = Path("/usr/include", f"{platform.machine()}-linux-gnu", f"python{python.version}")
        if not folder.is_dir():
            return ""
        link = self._place / "include" / f"{processor}-linux-gnu" / folder.name
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.exists():
            link.symlink_to(folder)
        return f"-isystem {self._place / 'include'}"

    def _zig(self, processor: str) -> str:
        return f"{sys.executable} -m ziglang c++ -target {processor}-linux-gnu.{GLIBC}"

    def _cuda_link(self, nvcc: str, processor: str) -> str:
        """Return the command that links what nvcc and g++ have compiled.

        g++'s library becomes part of the module: older systems have an older one.
        """
        asked = [nvcc, "--dryrun", "-shared", "-cudart=static", "none.o"]
        said = subprocess.run(asked, check=True, capture_output=True, text=True).stderr
        (options,) = re.findall(r"LIBRARIES=(.*)", said)
        folders = [option for option in shlex.split(options) if Path(option.removeprefix("-L")).is_dir()]
        libraries = [library_of_gcc("libstdc++.a"), library_of_gcc("libgcc_s.so.1"), *folders]
        newer = self._place / "newer.c"
        newer.write_text(NEWER)
        words = [
            "-nostdlib++",
            "-shared",
            self._exports,
            str(newer),
            *libraries,
            "-lcudart_static",
            "-lrt",
            "-ldl",
        ]
        return f"{self._zig(processor)} {shlex.join(words)}"

    def _wheel(self, python: Python, options: list[str], processor: str = "", **variables: str) -> Path:
        # What ninja has compiled stays: the engine is the same with the CUDA part and without.
        for folder in (self._tree / "dist", *(self._tree / "build").glob("lib*")):
            shutil.rmtree(folder, ignore_errors=True)
        setup = [python.path, "-W", "ignore", "setup.py", "--quiet"]
        # ninja's package looks for its program in Python's own folders only, not in this one.
        path = os.pathsep.join([str(self._tools / "bin"), os.environ["PATH"]])
        environment = {**os.environ, "PYTHONPATH": str(self._tools), "PATH": path, **variables}
        subprocess.run([*setup, "build_ext"], check=True, cwd=self._tree, env=environment)
        # Zig would compile its library anew for a stripped link.
        modules = (self._tree / "build").glob(f"ninja*-{processor}-*/*.so") if processor else ()
        for module in modules:
            subprocess.run([strip_for(processor), module], check=True)
        subprocess.run([*setup, "bdist_wheel", *options], check=True, cwd=self._tree, env=environment)
        (wheel,) = (self._tree / "dist").iterdir()
        return wheel

    def _require_portable(self, wheel: Path, processor: str) -> None:
        """The modules are for the processor, and need nothing but an old enough glibc."""
        self._require_anonymous(wheel)
        for name, path in self._modules(wheel):
            with path.open("rb") as file:
                module = ELFFile(file)
                machine = {"EM_X86_64": "x86_64", "EM_AARCH64": "aarch64"}[module["e_machine"]]
                needed, versions = needs_of(module)
            strange = [library for library in needed if not LIBRARIES.fullmatch(library)]
            newest = max(tuple(map(int, version.split("."))) for version in versions)
            limit = tuple(map(int, GLIBC.split(".")))
            if machine != processor or strange or newest > limit:
                raise SystemExit(f"{wheel.name}: {name} is for {machine}, needs {needed}, glibc {newest}")

    def _require_anonymous(self, wheel: Path) -> None:
        """The modules name no folder of this machine."""
        folders = {str(ROOT), str(self._tree), str(self._tools), str(Path.home()), tempfile.gettempdir()}
        folders |= {sys.prefix, sys.base_prefix} - {"/usr"}
        for name, path in self._modules(wheel):
            found = [folder for folder in folders if f"{folder}/".encode() in path.read_bytes()]
            if found:
                raise SystemExit(f"{wheel.name}: {name} names {', '.join(found)}")

    def _modules(self, wheel: Path) -> list[tuple[str, Path]]:
        unpacked = self._place / "unpacked"
        shutil.rmtree(unpacked, ignore_errors=True)
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(unpacked)
        found = [(path.name, path) for path in sorted(unpacked.rglob("*.so"))]
        if not found:
            raise SystemExit(f"{wheel.name} has no compiled module; the build above says why")
        return found


def library_of_gcc(name: str) -> str:
    """Return the path of a library of the compiler that nvcc calls."""
    command = ["g++", f"-print-file-name={name}"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def strip_for(processor: str) -> str:
    """Return the command that removes symbols from modules for a processor."""
    command = "strip" if processor == platform.machine() else f"{processor}-linux-gnu-strip"
    if shutil.which(command) is None:
        raise SystemExit(f"{command} is missing (Debian: binutils, binutils-aarch64-linux-gnu)")
    return command


def needs_of(module: ELFFile) -> tuple[list[str], list[str]]:
    """Return the libraries that a module needs, and the versions of glibc's symbols."""
    needed: list[str] = []
    versions: list[str] = []
    for section in module.iter_sections():
        if isinstance(section, DynamicSection):
            needed += [tag.needed for tag in section.iter_tags() if tag.entry.d_tag == "DT_NEEDED"]
        elif isinstance(section, GNUVerNeedSection):
            for _, symbols in section.iter_versions():
                versions += [each.name.removeprefix("GLIBC_") for each in symbols if "GLIBC_" in each.name]
    return needed, versions


def build_sdist() -> Path:
    """Build the archive of the sources, without what lies around in the tree."""
    release = runpy.run_path(str(ROOT / "ckpt_fast" / "version.py"))["RELEASE"]
    command = [sys.executable, "-W", "ignore", "setup.py", "--quiet", "sdist", "--dist-dir", str(DIST)]
    subprocess.run(command, check=True, cwd=ROOT)
    return DIST / f"ckpt_fast-{release}.tar.gz"


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the sdist and all wheels into dist.")
    parser.add_argument("--tools", type=Path, required=True, help="where the build's packages are installed")
    parser.add_argument("--processor", action="append", choices=PROCESSORS, help="by default, all of them")
    parser.add_argument("pythons", nargs="+", metavar="PYTHON")
    arguments = parser.parse_args()
    shutil.rmtree(DIST, ignore_errors=True)
    pythons = [Python.at(path) for path in arguments.pythons]
    nvcc = None
    if os.environ.get("CKPT_FAST_CUDA") != "0":
        nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    with tempfile.TemporaryDirectory(prefix="ckpt_fast-wheels-") as place:
        sdist = build_sdist()
        builder = Builder(sdist, Path(place), arguments.tools.resolve())

        def keep(wheel: Path) -> None:
            shutil.move(wheel, DIST / wheel.name)
            print(f"{wheel.name}: {(DIST / wheel.name).stat().st_size / 1e6:.2f} MB", flush=True)

        print(f"{sdist.name}: {sdist.stat().st_size / 1e6:.2f} MB", flush=True)
        keep(builder.pure(pythons[0]))
        for python in pythons:
            for processor in arguments.processor or PROCESSORS:
                keep(builder.engine(python, processor))
                if nvcc is not None and processor == platform.machine():
                    keep(builder.cuda(python, nvcc))
    if nvcc is None:
        print("no wheel with the CUDA part: CKPT_FAST_CUDA=0, or nvcc was not found", flush=True)


if __name__ == "__main__":
    main()
