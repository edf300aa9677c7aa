# SPDX-License-Identifier: Apache-2.0
"""Run a selection that takes about an hour, each benchmark in a process of its own: ``make bench``.

    python -m benchmarks [DIRECTORY FOR REPORTS]

In a large process, forks and page faults are more expensive; this way, none inherits another's heap.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
_LOOP = ["bench_loop.py", "--rounds", "3", "--saves", "1"]
_FEW_LARGE_LAYERS = ["--layers", "12", "--hidden-size", "512"]
_MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else tempfile.gettempdir()
# Script and arguments, by the name of the report.
RUNS = {
    "save": ["bench_save.py"],
    "save-memory": ["bench_save.py", "--path", _MEMORY],
    "save-page-cache": ["bench_save.py", "--page-cache"],
    "save-many": ["bench_save.py", "--many", "--gigabytes", "0.27", "--rounds", "3"],
    "load": ["bench_load.py"],
    "load-many": ["bench_load.py", "--many", "--gigabytes", "0.27", "--rounds", "3"],
    "stall": ["bench_stall.py"],
    "loop": _LOOP,
    "loop-12-layers": [*_LOOP, *_FEW_LARGE_LAYERS],
    "growth": ["bench_growth.py"],
    "plan": ["bench_plan.py", "--rounds", "1"],
    "glu": ["bench_glu.py"],
    "objects": ["bench_objects.py"],
}
# The same with two ranks.
ON_TWO_RANKS = {
    "stall-2-ranks": ["bench_stall.py"],
    "loop-2-ranks": _LOOP,
    "loop-12-layers-2-ranks": [*_LOOP, *_FEW_LARGE_LAYERS],
}
PARTS = ["bench_parts.py"]


_TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


def main() -> int:
    """Run everything, carrying on after failures; return the number of failures."""
    results = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "results"
    failed = 0
    for name, (script, *arguments) in (RUNS | ON_TWO_RANKS).items():
        launcher = _TORCHRUN if name in ON_TWO_RANKS else []
        command = [str(HERE / script), *arguments, "--output", str(results / f"{name}.txt")]
        failed += _run([sys.executable, "-W", "ignore", *launcher, *command])
    failed += _run([sys.executable, str(HERE / "plot.py"), str(results)])
    columns = "--benchmark-columns=min,median,max"
    failed += _run([sys.executable, "-m", "pytest", "-W", "ignore", columns, *(str(HERE / p) for p in PARTS)])
    return failed


def _run(command: list[str]) -> bool:
    print("\n$ " + " ".join(command), flush=True)
    return subprocess.run(command, check=False).returncode != 0


if __name__ == "__main__":
    sys.exit(main())
