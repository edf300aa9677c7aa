# SPDX-License-Identifier: Apache-2.0
"""Programs in forks of one process that has imported what they need: importing torch takes seconds.

They end as in a process of their own: what they raise reaches the interpreter, which runs its exit handlers.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]


class Ended(NamedTuple):
    """Exit status (negative: by which signal) and output of a program."""

    status: int
    stdout: str
    stderr: str


class Forked:
    """A program that runs."""

    def __init__(self, forks: Forks, pid: int, outputs: list[Path]) -> None:
        self._forks, self._pid, self._outputs = forks, pid, outputs

    def wait_for(self, text: str, timeout_s: float = 60.0) -> None:
        """Wait until it has printed ``text``."""
        deadline = time.monotonic() + timeout_s
        while text not in self._outputs[0].read_text():
            assert time.monotonic() < deadline, self._outputs[1].read_text()
            time.sleep(0.01)

    def send_signal(self, number: signal.Signals) -> None:
        os.kill(self._pid, number)

    def wait(self) -> Ended:
        """Wait until it has ended; once."""
        status = self._forks.ask({"wait": self._pid})
        return Ended(status, *(output.read_text() for output in self._outputs))


class Forks:
    """The process that forks."""

    def __init__(self, process: subprocess.Popen[str], outputs: Path) -> None:
        self._process, self._outputs, self._count = process, outputs, 0

    def begin(
        self, module: str, function: str, *arguments: str, directory: Path = ROOT, **environment: str
    ) -> Forked:
        """Begin ``module.function(*arguments)``, with a working directory and further variables."""
        self._count += 1
        outputs = [self._outputs / f"{self._count}.{name}" for name in ("stdout", "stderr")]
        for output in outputs:
            output.touch()
        task = {
            "call": [module, function, *arguments],
            "directory": str(directory),
            "environment": environment,
            "outputs": [str(output) for output in outputs],
        }
        return Forked(self, self.ask(task), outputs)

    def ask(self, task: dict[str, Any]) -> int:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(task) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())


@contextlib.contextmanager
def forks_of(
    modules: list[str], outputs: Path, environment: Mapping[str, str] | None = None
) -> Iterator[Forks]:
    """Start a process that imports ``modules``, in this order, and forks.

    Args:
        modules: that the programs need.
        outputs: a directory for what they print.
        environment: further variables of the process and the programs.
    """
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", "from tests import forks; forks._serve()", *modules],
        env={**os.environ, "PYTHONPATH": str(ROOT), **(environment or {})},
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        yield Forks(process, outputs)


def run_module(module: str, *arguments: str) -> None:
    """In a fork: run a module as ``python -m`` does."""
    sys.argv[1:] = arguments
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _serve() -> None:
    for module in sys.argv[1:]:
        importlib.import_module(module)
    gc.freeze()  # a fork that ends need not look through it
    for line in sys.stdin:
        task = json.loads(line)
        if "wait" in task:
            answer = os.waitstatus_to_exitcode(os.waitpid(task["wait"], 0)[1])
        else:
            answer = os.fork()
            if answer == 0:
                _run(**task)
                sys.exit()
        os.write(1, b"%d\n" % answer)


def _run(call: list[str], directory: str, environment: dict[str, str], outputs: list[str]) -> None:
    os.close(0)
    for number, output in enumerate(outputs, 1):
        os.dup2(os.open(output, os.O_WRONLY | os.O_APPEND), number)
    os.chdir(directory)
    os.environ.update(environment)
    module, function, *arguments = call
    getattr(importlib.import_module(module), function)(*arguments)
