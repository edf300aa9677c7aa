# SPDX-License-Identifier: Apache-2.0
"""The kernels' device code, compiled for the CPU and run thread by thread: needs no GPU."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[2] / "csrc"
COMPILER = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
@pytest.mark.parametrize("source", ["glu_tile_test.cc", "gather_copy_test.cc"])
def test_device_code_on_the_cpu(tmp_path: Path, source: str) -> None:
    program = tmp_path / "device_code_test"
    # Units are read as wider integers than the bytes they were written as, as on the device.
    flags = ["-std=c++17", "-g", "-fno-strict-aliasing", f"-I{CSRC}"]
    sanitize = "-fsanitize=address,undefined"
    path = Path(__file__).with_name(source)
    subprocess.run([str(COMPILER), *flags, sanitize, str(path), "-o", str(program)], check=True, timeout=120)
    done = subprocess.run([str(program)], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
