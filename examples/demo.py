# SPDX-License-Identifier: Apache-2.0
"""Train, get killed, resume, compare: what checkpoints are for, in one command (``make demo``).

    python examples/demo.py [--directory demo-run] [-- arguments for train_gpt.py]

1. *whole*: a run that nothing interrupts; it saves once, at its end.
2. *killed*: the same run, saving every few steps, until SIGKILL hits all its processes inside a step.
3. *resumed*: the same command again; it loads the newest checkpoint and trains to the end.

Then every loss and gradient norm of *killed* and *resumed* must equal that of *whole* bit for bit, stock
megatron-core must read the same tensors from the final checkpoints of *whole* and *resumed*, and every item
must be a sound ZIP archive. Prints one table; the exit status is 0 only if all of this holds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).resolve().parent
RUN_TIMEOUT_S = 600.0
Record = dict[str, Any]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--directory", type=Path, default=Path("demo-run"), help="emptied first")
    parser.add_argument("--train-iters", type=int, default=24)
    parser.add_argument("--save-interval", type=int, default=4)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, help="of the moment of the kill; default: another one each time")
    parser.add_argument(
        "train_args",
        nargs="*",
        default=["--use-distributed-optimizer"],
        help="after --: arguments for train_gpt.py instead of %(default)s",
    )
    args = parser.parse_args()
    if not 2 <= args.save_interval <= args.train_iters // 3:
        parser.error("the kill needs steps after two saves: use --train-iters >= 3 * --save-interval >= 6")
    return args


class Run:
    """One torchrun of ``train_gpt.py``: its JSON lines in ``records``, its output in ``<name>.out``."""

    def __init__(self, name: str, args: argparse.Namespace, *options: str) -> None:
        self.name = name
        self.records: list[Record] = []
        log = args.directory / f"{name}.jsonl"
        log.touch()
        self._log = log.open()
        self._output = args.directory / f"{name}.out"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc-per-node={args.ranks}", str(EXAMPLES / "train_gpt.py")]
        command += [f"--train-iters={args.train_iters}", f"--log-file={log}", *options, *args.train_args]
        environment = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", **os.environ}
        with self._output.open("w") as output:
            self._process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, env=environment
            )

    def follow(self, on_record: Callable[[Record], bool] = lambda record: False) -> bool:
        """Show and collect records until the run ends, or until ``on_record`` returns True for one of them.

        Returns:
            Whether ``on_record`` returned True.

        Raises:
            SystemExit: the run failed or took too long; its output has been shown.
        """
        deadline = time.monotonic() + RUN_TIMEOUT_S
        ended = False
        while not ended:
            ended = self._process.poll() is not None  # before reading, so that the last line is not missed
            for record in self._new_records():
                if on_record(record):
                    return True
            if time.monotonic() > deadline:
                self.kill()
                self._fail(f"did not end within {RUN_TIMEOUT_S:.0f} s")
            time.sleep(0.005)
        if self._process.returncode != 0:
            self._fail(f"ended with status {self._process.returncode}")
        return False

    def kill(self) -> None:
        """Send SIGKILL to the launcher and every rank; return when none is running any more."""
        processes = process_tree(self._process.pid)
        for pid in processes:
            os.kill(pid, signal.SIGKILL)
        self._process.wait()
        while any(is_running(pid) for pid in processes):
            time.sleep(0.01)
        list(self._new_records())

    def select(self, key: str) -> list[Record]:
        """Return the records that have ``key``."""
        return [record for record in self.records if key in record]

    def seconds_per_step(self) -> float:
        """Return the median time between two step records."""
        times = [record["time"] for record in self.select("step")]
        return statistics.median(later - earlier for earlier, later in itertools.pairwise(times))

    def _new_records(self) -> Iterator[Record]:
        while line := self._log.readline():
            self.records.append(json.loads(line) | {"time": time.monotonic()})
            print(f"  {self.name:8}", describe(self.records[-1]), flush=True)
            yield self.records[-1]

    def _fail(self, reason: str) -> None:
        print(self._output.read_text()[-8000:], file=sys.stderr)
        raise SystemExit(f"demo: the run '{self.name}' {reason}; its output is above and in {self._output}")


def describe(record: Record) -> str:
    """Format a record as one human-readable line."""
    if "step" in record:
        return f"step {record['step']:3}  loss {float.fromhex(record['loss']):.4f}"
    if "saved" in record:
        return f"saved step {record['saved']}: {record['nbytes'] / 1e6:.1f} MB in {record['files']} files"
    return f"starts after step {record['start']}"


def process_tree(root: int) -> list[int]:
    """Return ``root`` and all its descendants; every rank has its own session, so no group covers them."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has just exited
        children.setdefault(parent, []).append(int(stat.parent.name))
    tree = [root]
    for pid in tree:
        tree += children.get(pid, [])
    return tree


def is_running(pid: int) -> bool:
    """Return whether the process exists and is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def kill_inside_a_step(run: Run, args: argparse.Namespace, seconds_per_step: float) -> None:
    """Let ``run`` make two saves, then kill it at a random moment of a random step.

    Background saves may take longer: then the kill waits until a first one is durable.
    """
    chance = random.Random(args.seed)
    steps = range(2 * args.save_interval + 1, args.train_iters - 1)
    last_step = chance.choice([step for step in steps if step % args.save_interval])

    def kill(record: Record) -> bool:
        if record.get("step", 0) < last_step or not run.select("saved"):
            return False
        time.sleep(chance.uniform(0.2, 0.8) * seconds_per_step)
        run.kill()
        return True

    if not run.follow(kill):
        raise SystemExit("demo: the run ended before it could be killed; use more --train-iters")


def train_three_times(args: argparse.Namespace) -> tuple[Run, Run, Run]:
    """Run *whole*, *killed* and *resumed*, one after the other."""
    whole = Run("whole", args, f"--save={args.directory}/whole", f"--save-interval={args.train_iters}")
    whole.follow()
    checkpoints = f"{args.directory}/checkpoints"
    options = (f"--save={checkpoints}", f"--load={checkpoints}", f"--save-interval={args.save_interval}")
    killed = Run("killed", args, *options)
    kill_inside_a_step(killed, args, whole.seconds_per_step())
    print(f"  {killed.name:8} SIGKILL", flush=True)
    resumed = Run("resumed", args, *options)
    resumed.follow()
    return whole, killed, resumed


def differences(whole: Run, killed: Run, resumed: Run) -> list[str]:
    """Return all differences between the interrupted and the uninterrupted run; empty if identical."""
    found = []
    expected = {record["step"]: (record["loss"], record["grad_norm"]) for record in whole.select("step")}
    for run in (killed, resumed):
        for record in run.select("step"):
            if (record["loss"], record["grad_norm"]) != expected[record["step"]]:
                found.append(f"step {record['step']} of the run '{run.name}' has another loss or gradient")
    start = resumed.select("start")[0]["start"]
    newest_save = killed.select("saved")[-1]["saved"]
    if start < newest_save:
        found.append(f"the resumed run started after step {start}, though step {newest_save} was saved")
    if [record["step"] for record in resumed.select("step")] != list(range(start + 1, len(expected) + 1)):
        found.append("the resumed run did not make every step once")
    return found


def summarize(args: argparse.Namespace, killed: Run, resumed: Run, checkpoints: Path) -> dict[str, str]:
    """Summarize the outcome as rows of the table."""
    saves = killed.select("saved") + resumed.select("saved")
    stalls = [save["stall_s"] * 1e3 for save in saves]
    speeds = [save["nbytes"] / save["seconds"] / 1e9 for save in saves]
    files = sum(path.is_file() for path in checkpoints.rglob("*"))
    start = resumed.select("start")[0]["start"]
    return {
        "steps": f"{args.train_iters} on {args.ranks} ranks, saved every {args.save_interval}",
        "killed": f"SIGKILL inside step {killed.select('step')[-1]['step'] + 1}",
        "resumed step": f"{start}, then {args.train_iters - start} steps to the end",
        "stall per save": f"{statistics.median(stalls):.0f} ms (of {len(saves)}; worst {max(stalls):.0f} ms)",
        "GB/s": f"{statistics.median(speeds):.2f} ({saves[0]['nbytes'] / 1e6:.1f} MB per save, durable)",
        "files written": f"{files} in {len(list(checkpoints.glob('iter_*')))} checkpoints",
    }


def show_table(rows: dict[str, str]) -> None:
    width = max(map(len, rows)) + 1
    print()
    for name, value in rows.items():
        print(f"  {name + ':':{width}} {value}")


def main() -> int:
    args = parse_args()
    shutil.rmtree(args.directory, ignore_errors=True)
    args.directory.mkdir(parents=True)
    began = time.monotonic()
    whole, killed, resumed = train_three_times(args)
    found = differences(whole, killed, resumed)

    from stock_reader import damaged_items, different_tensors  # imports torch, which is not needed until here

    final = [args.directory / name / f"iter_{args.train_iters:07d}" for name in ("whole", "checkpoints")]
    items, damaged = damaged_items(final[1])
    tensors, different = different_tensors(*final)
    found += [f"item {name} is no sound ZIP archive" for name in damaged]
    found += [f"tensor {name} differs from the uninterrupted run's" for name in different]

    show_table(
        summarize(args, killed, resumed, final[1].parent)
        | {
            "items": f"{items - len(damaged)} of {items} are sound ZIP archives",
            "stock megatron-core": f"reads {tensors - len(different)} of {tensors} tensors identical",
            "time": f"{time.monotonic() - began:.0f} s",
            "identical": "no" if found else "yes",
        }
    )
    for difference in found:
        print(f"  {difference}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
