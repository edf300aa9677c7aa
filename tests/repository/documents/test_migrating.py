# SPDX-License-Identifier: Apache-2.0
"""docs/migrating.md: both sides of each diff are programs, and each reads what the other has saved."""

from __future__ import annotations

import ast
import importlib
import inspect
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import serialization

import ckpt_fast
from ckpt_fast import compat
from tests import models
from tests.doors.megatron.test_stock_queue import make_queue
from tests.helpers import run_ranks
from tests.repository.documents import snippets
from tests.repository.documents.pages import ROOT, blocks

PAGE = ROOT / "docs" / "migrating.md"
# Not installed on the stacks.
ABSENT = ("megatron.bridge", "torch_checkpointing")
Sides = tuple[str, str]


def sides(diff: str) -> Sides:
    """Return the program before and after."""
    lines = [(line[:1], line[1:]) for line in diff.splitlines()]
    assert all(mark in ("", " ", "+", "-") for mark, _ in lines)
    before, after = ("\n".join(text for mark, text in lines if mark != other) + "\n" for other in ("+", "-"))
    return before, after


def statements(code: str) -> tuple[list[ast.stmt], list[ast.stmt]]:
    """Return (imports, others)."""
    body = ast.parse(code).body
    kinds = (ast.Import, ast.ImportFrom)
    return [each for each in body if isinstance(each, kinds)], [
        each for each in body if not isinstance(each, kinds)
    ]


def run(body: list[ast.stmt], names: dict[str, Any]) -> None:
    exec(compile(ast.Module(body, []), "diff", "exec"), names)


def crossed(rank: int, pair: Sides, directory: str) -> None:
    """What one side saves in its first statement, the other loads in its second."""
    for number, (one, other) in enumerate((pair, pair[::-1])):
        weight = torch.arange(12.0).view(3, 4)
        names = {"state_dict": {"weight": weight, "step": 7}, "directory": f"{directory}/{number}"}
        for code, place in ((one, 0), (other, 1)):
            imports, others = statements(code)
            run([*imports, others[place]], names)
            if place == 0:
                weight.zero_()
        assert torch.equal(weight, torch.arange(12.0).view(3, 4))


def whole(rank: int, pair: Sides, directory: str) -> None:
    """As ``crossed``; and each side runs from the beginning to the end."""
    crossed(rank, pair, directory)
    for number, code in enumerate(pair):
        state = {"weight": torch.arange(12.0)}
        run(ast.parse(code).body, {"state_dict": state, "directory": f"{directory}/whole{number}"})


def megatron_core(rank: int, pair: Sides, directory: str) -> None:
    """Both sides save weights and load them."""
    for number, code in enumerate(pair):
        snippets.megatron_core(rank, code, f"{directory}/{number}")


def queue(rank: int, pair: Sides, directory: str) -> None:
    """The queue of the stock package takes the request of ours."""
    passes_it_on = "async_strategy" in inspect.signature(dist_checkpointing.save).parameters
    with models.Run(models.Setup()) as training, models.megatron_on_cpu():
        stock, _ = make_queue("nvrx-temporary" if passes_it_on else "mcore-temporary")
        chunk = compat.unwrap_model(training.model)[0]
        Path(directory).mkdir(exist_ok=True)
        run(ast.parse(pair[1]).body, {"model": chunk, "directory": directory, "queue": stock})
        stock.maybe_finalize_async_calls(blocking=True)
        stock.close()
    assert ckpt_fast.verify(directory, deep=True)


def local(rank: int, pair: Sides, directory: str) -> None:
    names: dict[str, Any] = {"directory": directory, "replication": None}
    run(ast.parse(pair[1]).body, names)
    assert isinstance(names["manager"], ckpt_fast.FastLocalCheckpointManager)


def torch_checkpointing(rank: int, pair: Sides, directory: str) -> None:
    """Run twice, our side goes on where it was."""
    for expected in (0, 1):
        state = {"weight": torch.full((3,), float(expected))}
        names: dict[str, Any] = {"state_dict": state, "directory": directory}
        run(ast.parse(pair[1]).body, names)
        assert names["step"] == expected
        assert state["weight"].tolist() == [0.0] * 3


def megatron_lm(rank: int, pair: Sides, directory: str) -> None:
    """While the training loop runs, Megatron-Core makes our strategies."""
    made = []
    names = {
        "pretrain": lambda *_: made.append(serialization.get_default_save_sharded_strategy()),
        "train_valid_test_datasets_provider": None,
        "model_provider": None,
        "forward_step": None,
        "ModelType": types.SimpleNamespace(encoder_or_decoder=None),
    }
    try:
        run(ast.parse(pair[1]).body, names)
    finally:
        ckpt_fast.uninstall()
    assert [type(each) for each in made] == [ckpt_fast.FastSaveStrategy]


def bridge_manager(rank: int, pair: Sides, directory: str) -> None:
    snippets.bridge(rank, pair[1], directory)


def bridge_functions(rank: int, pair: Sides, directory: str) -> None:
    snippets.documented_api(rank, pair[1], directory)


# A string that is in this diff and in no other.
DIFFS: dict[str, Callable[[int, Sides, str], None]] = {
    "custom_manager_class": bridge_manager,
    "from ckpt_fast.checkpointing import": bridge_functions,
    "pretrain(": megatron_lm,
    "FastLoadStrategy())": megatron_core,
    "FastStorageReader(directory)": crossed,
    "ckpt_fast.async_save": whole,
    "manager.restore(": torch_checkpointing,
    "FastLocalCheckpointManager(": local,
    "queue.schedule": queue,
}


@pytest.mark.parametrize("marker", DIFFS)
def test_both_sides_of_a_diff(marker: str, tmp_path: Path) -> None:
    (diff,) = [block for block in blocks(PAGE, "diff") if marker in block]
    run_ranks(DIFFS[marker], 1, sides(diff), str(tmp_path / "checkpoint"))


def test_every_diff_is_run() -> None:
    for diff in blocks(PAGE, "diff"):
        assert len([marker for marker in DIFFS if marker in diff]) == 1, diff


@pytest.mark.parametrize("diff", blocks(PAGE, "diff"), ids=lambda diff: diff.split("\n")[0].strip())
def test_names_of_a_diff_exist(diff: str) -> None:
    for code in sides(diff):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and not (node.module or "").startswith(ABSENT):
                module = importlib.import_module(node.module or "")
                assert [each.name for each in node.names if not hasattr(module, each.name)] == []
