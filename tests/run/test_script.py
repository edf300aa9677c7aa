# SPDX-License-Identifier: Apache-2.0
"""``python -m ckpt_fast.run``: a script that does not know of ckpt_fast, run as Python itself would."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from tests.doors.installing.test_torch_dcp import is_ours
from tests.forks import Ended, Forks, forks_of

ROOT = Path(__file__).resolve().parents[2]
STARTERS = {
    "module": [sys.executable, "-W", "ignore", "-m", "ckpt_fast.run"],
    "command": [sys.executable, "-W", "ignore", "-m", "ckpt_fast.cli", "run"],
}
# Importing torch is faster with it.
DYNAMO = {"TORCHDYNAMO_DISABLE": "1"}
SCRIPT = """
import multiprocessing
import os
import sys

if __package__:
    from . import beside
else:
    import beside  # in the script's directory


class Mine:
    size: int = 7


def child(queue):
    queue.put(type(Mine()).__module__)


def what_i_see():
    import __main__
    return {
        "name": __name__,
        "file": __file__,
        "argv": sys.argv,
        "path": sys.path[0],
        "main": __main__.Mine is Mine and vars(__main__) is globals(),
        "package": __package__,
        "spec": __spec__ and __spec__.name,
        "loader": [type(__loader__).__name__, __loader__.name],
        "types": str(Mine.__annotations__),  # not texts: that is for scripts which ask for it
        "beside": beside.VALUE,
        "dynamo": os.environ.get("TORCHDYNAMO_DISABLE"),
    }


if __name__ == "__main__":
    import json
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=child, args=(queue,))
    process.start()
    seen = {**what_i_see(), "child": queue.get(timeout=60)}
    process.join()
    print(json.dumps(seen))
    if os.environ["SAVES"] == "1":
        import torch
        import torch.distributed.checkpoint as dcp

        dcp.save({"w": torch.arange(5.0)}, checkpoint_id=sys.argv[-1])
"""


@pytest.fixture(scope="module")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    modules = ["torch.distributed.checkpoint", "ckpt_fast.cli.run", "ckpt_fast.run.script"]
    modules += ["ckpt_fast.doors.dcp.substitutions", "ckpt_fast.doors.dcp.writer"]  # what installing imports
    with forks_of(modules, tmp_path_factory.mktemp("outputs"), DYNAMO) as forks:
        yield forks


def call_fork(forks: Forks, command: list[str], directory: Path, code: int = 0, **more: str) -> Ended:
    """As ``call`` does, for ``python ... -m MODULE ...``."""
    arguments = command[command.index("-m") + 1 :]
    done = forks.begin("tests.forks", "run_module", *arguments, directory=directory, **more).wait()
    assert done.status == code, done.stdout + done.stderr
    return done


def call(command: list[str], directory: Path, code: int = 0, **more: str) -> Any:
    environment = {name: value for name, value in os.environ.items() if name != "TORCHDYNAMO_DISABLE"}
    done = subprocess.run(
        command,
        cwd=directory,
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
        env={**environment, "PYTHONPATH": str(ROOT), **more},
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done


@pytest.fixture
def script(tmp_path: Path) -> Path:
    directory = tmp_path / "scripts"
    directory.mkdir()
    (directory / "train.py").write_text(SCRIPT)
    (directory / "beside.py").write_text("VALUE = 7\n")
    return directory / "train.py"


@pytest.mark.parametrize("starter", STARTERS)
def test_a_script_sees_what_it_would_without(
    starter: str, script: Path, forks: Forks, tmp_path: Path
) -> None:
    """All but the files that it writes."""
    arguments = ["scripts/train.py", "--help", "-m", "--no-megatron", "saved"]
    command = [*STARTERS[starter], "--no-megatron", *arguments]
    if starter == "module":  # in a process of its own, as a user starts it
        without = json.loads(call([sys.executable, *arguments], tmp_path, SAVES="0").stdout)
        seen = json.loads(call(command, tmp_path, SAVES="1").stdout)
    else:
        without = json.loads(call([sys.executable, *arguments], tmp_path, **DYNAMO, SAVES="0").stdout)
        seen = json.loads(call_fork(forks, command, tmp_path, SAVES="1").stdout)
    assert seen == without and seen["argv"] == arguments and seen["child"] == "__mp_main__"
    assert is_ours(tmp_path / "saved")
    found = {"w": torch.zeros(5)}
    dcp.load(found, checkpoint_id=tmp_path / "saved")
    assert torch.equal(found["w"], torch.arange(5.0))


@pytest.mark.parametrize("starter", STARTERS)
def test_a_module(starter: str, script: Path, forks: Forks) -> None:
    package = script.parent / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    script.rename(package / "train.py")
    (script.parent / "beside.py").rename(package / "beside.py")
    arguments = ["-m", "package.train", "--verbose", "saved"]
    without = call([sys.executable, *arguments], script.parent, **DYNAMO, SAVES="0")
    command = [*STARTERS[starter], "--no-megatron", *arguments]
    seen = json.loads(call_fork(forks, command, script.parent, SAVES="1").stdout)
    assert seen == json.loads(without.stdout) and seen["spec"] == "package.train"
    assert is_ours(script.parent / "saved")


@pytest.mark.parametrize("starter", STARTERS)
def test_a_package(starter: str, forks: Forks, tmp_path: Path) -> None:
    main = tmp_path / "package" / "__main__.py"
    main.parent.mkdir()
    (main.parent / "__init__.py").write_text("")
    main.write_text("import sys; print(__spec__.name, *sys.argv)")
    done = call_fork(forks, [*STARTERS[starter], "--no-megatron", "-m", "package", "-v"], tmp_path)
    assert done.stdout == f"package.__main__ {main} -v\n"


@pytest.mark.parametrize("starter", STARTERS)
@pytest.mark.parametrize(
    ("text", "code", "said"),
    [
        ("raise SystemExit(7)", 7, ""),
        ("raise SystemExit('stopped')", 1, "stopped\n"),
        ("def step():\n    raise KeyError('lost')\nstep()", 1, ", line 2, in step\n"),
        ("raise KeyboardInterrupt", 130, "KeyboardInterrupt"),
        ("import click\nraise click.UsageError('theirs')", 1, "UsageError: theirs"),
    ],
)
def test_how_a_script_ends(
    starter: str, text: str, code: int, said: str, forks: Forks, tmp_path: Path
) -> None:
    (tmp_path / "train.py").write_text(text)
    # A process that an interrupt has ended tells its parent by the signal.
    code = -2 if code == 130 else code
    done = call_fork(forks, [*STARTERS[starter], "--no-megatron", "train.py"], tmp_path, code)
    assert said in done.stderr


@pytest.mark.parametrize("starter", STARTERS)
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "which script"),
        (["-m"], "which script"),
        (["--fast", "train.py"], "unknown option --fast"),
        (["missing.py"], "cannot open missing.py: No such file"),
        (["-m", "no_such_module"], "there is no module no_such_module"),
    ],
)
def test_wrong_use(starter: str, arguments: list[str], said: str, forks: Forks, tmp_path: Path) -> None:
    done = call_fork(forks, [*STARTERS[starter], *arguments], tmp_path, 2)
    assert said in done.stderr and "--help" in done.stderr


@pytest.mark.parametrize("starter", STARTERS)
def test_help(starter: str, forks: Forks, tmp_path: Path) -> None:
    assert "-m MODULE" in call_fork(forks, [*STARTERS[starter], "--help"], tmp_path).stdout


PROCESSES = """
import multiprocessing

from torch.distributed.checkpoint import FileSystemWriter


def child(queue):
    queue.put(type(FileSystemWriter("x")).__name__)


if __name__ == "__main__":
    for method in ("fork", "spawn"):
        context = multiprocessing.get_context(method)
        queue = context.SimpleQueue()
        process = context.Process(target=child, args=(queue,))
        process.start()
        print(method, queue.get())
        process.join()
"""


def test_processes_of_the_script(tmp_path: Path) -> None:
    """What it forks has ckpt_fast; what it starts anew imports torch for itself."""
    (tmp_path / "train.py").write_text(PROCESSES)
    printed = call([*STARTERS["module"], "--no-megatron", "train.py"], tmp_path).stdout
    assert printed == "fork FastStorageWriter\nspawn FileSystemWriter\n"


# What holds a group at the end of the process lets threads of gloo abort it at times.
RANKS = """
import gc
import sys
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (dist.get_world_size(),))
state = {"w": distribute_tensor(torch.arange(12.0).view(6, 2), mesh, [Shard(0)])}
dcp.save(state, checkpoint_id=sys.argv[1])
dist.barrier()
del mesh, state
dist.destroy_process_group()
gc.collect()
"""


@pytest.mark.parametrize("script", [["train.py"], ["-m", "train"]])
def test_torchrun(forks: Forks, script: list[str], tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(RANKS)
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node=2", "-m", "ckpt_fast.run", "--no-megatron", *script, "saved"]
    call_fork(forks, command, tmp_path, OMP_NUM_THREADS="1")  # the ranks are processes of their own
    assert is_ours(tmp_path / "saved") and len(list((tmp_path / "saved").glob("*.distcp"))) == 2
    found = {"w": torch.zeros(6, 2)}
    dcp.load(found, checkpoint_id=tmp_path / "saved")
    assert torch.equal(found["w"], torch.arange(12.0).view(6, 2))
