# SPDX-License-Identifier: Apache-2.0
"""Build the sdist and, from it, all wheels: ``make wheels``.

    python scripts/wheels.py [--tools DIRECTORY] PYTHON...

In ``dist``: one wheel in pure Python for every system; for Linux, each PYTHON, and x86-64 and aarch64, one
with the engine; for x86-64, if nvcc is found, one with the engine and the CUDA part, whose version names it.

For aarch64, the engine is compiled by Zig for glibc 2.28, as torch's own wheels are. For x86-64, engine and
CUDA part by this machine's compiler, and auditwheel tells for which glibc: build where that is old.
Every compiled module is checked: what it needs from the system, and that it names no folder of this machine.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import runpy
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
LIBRARIES = re.compile(r"(libc|libm|libdl|librt|libpthread)\.so\.\d|ld-linux-\w+(-\w+)?\.so\.\d")
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
        # A build that names its CUDA is not the sdist's version.
        (self._tree / "PKG-INFO").unlink()

    def pure(self, python: Python) -> Path:
        """Build the wheel without compiled modules."""
        return self._wheel(python, [], CKPT_FAST_NATIVE="0")

    def engine(self, python: Python) -> Path:
        """Build the wheel with the engine for x86-64."""
        return self._repaired(python, CKPT_FAST_CUDA="0")

    def cuda(self, python: Python) -> Path:
        """Build the wheel with engine and CUDA part for x86-64."""
        return self._repaired(python)

    def arm(self, python: Python) -> Path:
        """Build the wheel with the engine for aarch64."""
        wheel = self._wheel(
            python,
            ["--plat-name", f"manylinux_{GLIBC.replace('.', '_')}_aarch64"],
            "aarch64",
            CXX=f"{sys.executable} -m ziglang c++ -target aarch64-linux-gnu.{GLIBC}",
            CKPT_FAST_CUDA="0",
            SETUPTOOLS_EXT_SUFFIX=f".{python.soabi.replace('x86_64', 'aarch64')}.so",
        )
        self._require_portable(wheel, "aarch64")
        return wheel

    def _repaired(self, python: Python, **variables: str) -> Path:
        """Build with this machine's compiler, and give the wheel the tag that auditwheel finds."""
        wheel = self._wheel(python, [], **variables)
        repaired = self._place / "repaired"
        shutil.rmtree(repaired, ignore_errors=True)
        path = os.pathsep.join([str(self._tools / "bin"), os.environ["PATH"]])
        repair = [sys.executable, "-m", "auditwheel", "repair", "--wheel-dir", str(repaired), str(wheel)]
        subprocess.run(repair, check=True, env={**os.environ, "PATH": path}, stdout=subprocess.DEVNULL)
        wheel.unlink()
        (found,) = repaired.iterdir()
        self._require_anonymous(found)
        return found

    def _wheel(self, python: Python, options: list[str], processor: str = "x86_64", **variables: str) -> Path:
        for name in ("dist", "build"):
            shutil.rmtree(self._tree / name, ignore_errors=True)
        setup = [python.path, "-W", "ignore", "setup.py", "--quiet"]
        environment = {**os.environ, "PYTHONPATH": str(self._tools), **variables}
        subprocess.run([*setup, "build_ext"], check=True, cwd=self._tree, env=environment)
        # Zig would compile its library anew for a stripped link.
        for module in (self._tree / "build").glob("ninja*/*.so"):
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
    parser.add_argument("pythons", nargs="+", metavar="PYTHON")
    arguments = parser.parse_args()
    shutil.rmtree(DIST, ignore_errors=True)
    pythons = [Python.at(path) for path in arguments.pythons]
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
            keep(builder.engine(python))
            keep(builder.arm(python))
            if nvcc is not None:
                keep(builder.cuda(python))
    if nvcc is None:
        print("no wheel with the CUDA part: nvcc was not found", flush=True)


if __name__ == "__main__":
    main()
