# SPDX-License-Identifier: Apache-2.0
"""Names of optional packages: detected if installed; otherwise harmless, or a clear error."""

from __future__ import annotations

import copy
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing, num_microbatches_calculator, parallel_state
from megatron.core.dist_checkpointing import ShardedTensor

from ckpt_fast import compat
from ckpt_fast.compat import SoloGroup, UnavailableError, get_pg_collection, safe_import
from ckpt_fast.optional import without_megatron_core
from tests.helpers import run_ranks
from tests.models import megatron_on_cpu


def test_every_name_is_there() -> None:
    assert [name for name in compat.__all__ if not hasattr(compat, name)] == []


# --- Missing packages ------------------------------------------------------------------------------------


def test_safe_import() -> None:
    module, present = safe_import("json")
    assert present
    assert module.loads("1") == 1

    placeholder, present = safe_import("no_such_package.part")
    assert not present
    for use in (lambda: placeholder.anything, placeholder, lambda: placeholder.a.b):
        with pytest.raises(UnavailableError, match=r"no_such_package\.part is needed"):
            use()
    # Introspection gets an AttributeError, not an import error.
    assert copy.copy(placeholder) is not None
    assert not hasattr(placeholder, "__wrapped__")


def test_a_broken_package_is_not_a_missing_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_package.py").write_text("raise ValueError('half installed')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ValueError, match="half installed"):
        safe_import("broken_package")


WITHOUT_MEGATRON_CORE = """
import sys
sys.modules["megatron"] = sys.modules["nvidia_resiliency_ext"] = None
import importlib
import torch
import torch.distributed.checkpoint as dcp
import ckpt_fast
from ckpt_fast import FastStorageReader, FastStorageWriter, cli
directory, *modules = sys.argv[1:]
dcp.save({"w": torch.arange(9.0), "step": {"n": 3}}, storage_writer=FastStorageWriter(directory))
loaded = {"w": torch.zeros(9), "step": {"n": 0}}
dcp.load(loaded, storage_reader=FastStorageReader(directory))
assert torch.equal(loaded["w"], torch.arange(9.0)) and loaded["step"] == {"n": 3}
assert ckpt_fast.last_report().directory == directory and ckpt_fast.__version__
with ckpt_fast.install() as installed:
    assert installed.changed and not any("megatron" in name for name in installed.changed)
    dcp.load(loaded, checkpoint_id=directory)
try:
    ckpt_fast.install(megatron=True)
except ImportError as error:
    assert "pip install megatron-core" in str(error), error
else:
    raise SystemExit("installed into nothing")
assert cli.main(["verify", directory]) == cli.main(["inspect", directory]) == 0
for module in modules * 2:
    try:
        importlib.import_module(module)
    except ImportError as error:
        assert "pip install megatron-core" in str(error) and "ckpt_fast[megatron]" in str(error), error
    else:
        raise SystemExit(f"no error from {module}")
"""


def test_torch_dcp_works_without_megatron_core(tmp_path: Path) -> None:
    """And what needs Megatron-Core says what to install."""
    modules = [
        "ckpt_fast.checkpointing",
        "ckpt_fast.doors.megatron.substitutions",
        "ckpt_fast.trainer.bridge",
    ]
    run_python(WITHOUT_MEGATRON_CORE, str(tmp_path), *modules)


COMMANDS_WITHOUT_MEGATRON_CORE = """
import contextlib, io, json, sys
sys.modules["megatron"] = sys.modules["nvidia_resiliency_ext"] = None
import torch
from ckpt_fast import CheckpointManager, cli
stock, *roots = sys.argv[1:]
def whole_steps(root):
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert cli.main(["ls", root, "--json"]) == 0
    return [each["iteration"] for each in json.loads(printed.getvalue()) if each["is_complete"]]
with CheckpointManager(roots[0]) as manager:
    for step in (1, 2, 3, 4):
        manager.save(step, {"w": torch.arange(9.0) + step})
for number, root in enumerate(roots):
    assert whole_steps(root) == [1, 2, 3, 4][number:]
    third, fourth = f"{root}/iter_0000003", f"{root}/iter_0000004"
    assert cli.main(["verify", "--deep", fourth]) == cli.main(["inspect", fourth]) == 0
    assert cli.main(["diff", third, fourth]) == 1
    assert cli.main(["prune", root, "--keep", str(3 - number)]) == 0
    assert whole_steps(root) == [2, 3, 4][number:]
assert whole_steps(stock) == [2]
assert cli.main(["verify", "--deep", f"{stock}/iter_0000002"]) == 0
assert cli.main(["convert", f"{stock}/iter_0000002", f"{stock}/weights", "--to", "safetensors"]) == 0
"""


def save_stock(rank: int, directory: str) -> None:
    os.makedirs(directory)
    tensor = ShardedTensor.from_rank_offsets("w", torch.arange(6.0))
    with megatron_on_cpu():
        dist_checkpointing.save({"w": tensor, "iteration": 2}, directory)


@pytest.mark.parametrize("in_storage", [False, True], ids=["directory", "object_storage"])
def test_the_commands_work_without_megatron_core(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_storage: bool
) -> None:
    """On checkpoints of ours, and on one of Megatron-Core."""
    roots = [str(tmp_path / "bucket" / "run")]
    if in_storage:
        pytest.importorskip("multistorageclient")
        provider = {"type": "file", "options": {"base_path": str(tmp_path / "bucket")}}
        config = tmp_path / "msc.json"
        config.write_text(json.dumps({"profiles": {"store": {"storage_provider": provider}}}))
        monkeypatch.setenv("MSC_CONFIG", str(config))
        roots.append("msc://store/run")
    run_ranks(save_stock, 1, str(tmp_path / "stock" / "iter_0000002"))
    run_python(COMMANDS_WITHOUT_MEGATRON_CORE, str(tmp_path / "stock"), *roots)


def test_a_package_that_megatron_core_lacks_is_named() -> None:
    missing = ModuleNotFoundError("No module named 'einops'", name="einops")
    assert without_megatron_core(missing) is missing


def run_python(code: str, *arguments: str) -> str:
    """Return what a separate process prints."""
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *arguments],
        capture_output=True,
        text=True,
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


WITHOUT_OPTIONAL_PACKAGES = """
import sys
for name in ("nvidia_resiliency_ext", "multistorageclient", "modelopt"):
    sys.modules[name] = None
import ckpt_fast
from ckpt_fast import compat
assert (compat.HAVE_RESIL, compat.HAVE_NVRX) == (False, False)
assert isinstance(compat.NVRxAsyncRequest, type)
assert not compat.MultiStorageClientFeature.is_enabled()
assert compat.get_async_strategy("mcore", "AsyncRequest")[1] is compat.MCoreAsyncRequest
calls = (
    lambda: compat.get_async_strategy("nvrx", "AsyncRequest"),
    compat.import_tensor_aware_state_dict,
    lambda: ckpt_fast.FastLocalCheckpointManager,
)
for call in calls:
    try:
        call()
    except (ImportError, RuntimeError) as error:
        print(error)
    else:
        raise SystemExit("no error")
compat.save_modelopt_state(None, {})
compat.save_sharded_modelopt_state(None, "", None)
compat.restore_modelopt_state(None, {})
try:
    compat.restore_modelopt_state(None, {"modelopt_state": {}})
except compat.UnavailableError as error:
    print(error)
else:
    raise SystemExit("no error")
"""


def test_without_any_optional_package() -> None:
    printed = run_python(WITHOUT_OPTIONAL_PACKAGES)
    queue, state_dict, local, _ = printed.splitlines()
    assert "nvidia-resiliency-ext" in queue and "mcore" in queue
    assert "resiliency" in state_dict
    assert "FastLocalCheckpointManager needs nvidia-resiliency-ext" in local
    assert "install nvidia-modelopt" in printed


def test_async_strategies() -> None:
    strategy, modules = compat.get_async_strategy("mcore")
    assert strategy == "mcore"
    assert modules["AsyncRequest"] is compat.MCoreAsyncRequest
    assert modules["AsyncCallsQueue"] is compat.MCoreAsyncCallsQueue
    assert callable(modules["get_write_results_queue"])
    with pytest.raises(TypeError, match="other"):
        compat.get_async_strategy("other")


@pytest.mark.skipif(not compat.HAVE_NVRX, reason="needs nvidia-resiliency-ext")
def test_nvrx_requests_are_the_class_of_the_nvrx_queue() -> None:
    assert compat.get_async_strategy("nvrx", "AsyncRequest") == ("nvrx", compat.NVRxAsyncRequest)


# --- Process groups --------------------------------------------------------------------------------------


class Wrapper:
    """Wraps a model as DDP and Float16Module do: the model is ``module``."""

    def __init__(self, module: Any) -> None:
        self.module = module


class Model:
    pg_collection: Any = None


def test_a_models_own_groups_are_found_through_wrappers() -> None:
    model = Model()
    model.pg_collection = object()
    assert get_pg_collection(model) is model.pg_collection
    assert get_pg_collection([Wrapper(Wrapper(model)), Wrapper(Model())]) is model.pg_collection


@pytest.mark.parametrize("model", [[], [Model()], [Wrapper(torch.nn.Linear(1, 1))], Model()])
def test_a_single_process_is_a_group_of_one(model: Any) -> None:
    groups = get_pg_collection(model)
    for group in (groups.tp, groups.pp, groups.ep, groups.cp, groups.dp, groups.dp_cp):
        assert isinstance(group, SoloGroup)
        assert (group.rank(), group.size()) == (0, 1)


def sizes_of_groups(rank: int, tensor_parallel: int) -> dict[str, tuple[int, int]]:
    if tensor_parallel:
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=tensor_parallel)
    groups = get_pg_collection([Wrapper(Model())])
    names = ("tp", "pp", "dp", "dp_cp")
    return {name: (getattr(groups, name).rank(), getattr(groups, name).size()) for name in names}


def test_default_groups_of_megatron() -> None:
    for rank, groups in enumerate(run_ranks(sizes_of_groups, 2, 2)):
        assert groups == {"tp": (rank, 2), "pp": (0, 1), "dp": (0, 1), "dp_cp": (0, 1)}


def test_without_megatrons_groups_all_ranks_are_data_parallel() -> None:
    for rank, groups in enumerate(run_ranks(sizes_of_groups, 2, 0)):
        assert groups == {"tp": (0, 1), "pp": (0, 1), "dp": (rank, 2), "dp_cp": (rank, 2)}


# --- Small equivalents -----------------------------------------------------------------------------------


def test_metadata_is_cleaned_in_a_copy() -> None:
    metadata = {"singleton_local_shards": False, "dp_cp_group": object()}
    assert compat.clean_metadata_for_serialization(metadata) == {"singleton_local_shards": False}
    assert "dp_cp_group" in metadata
    assert compat.clean_metadata_for_serialization(None) is None


def test_microbatches_are_updated_where_there_is_a_calculator() -> None:
    num_microbatches_calculator.unset_num_microbatches_calculator()
    compat.update_num_microbatches(consumed_samples=10)
    start = num_microbatches_calculator.init_num_microbatches_calculator
    if "step_batch_size_schedule" in inspect.signature(start).parameters:
        start(0, None, None, 1, 1, step_batch_size_schedule="0:2 8:4")
    else:
        start(0, [2, 2, 8], 4, 1, 1)
    try:
        assert num_microbatches_calculator.get_num_microbatches() == 2
        compat.update_num_microbatches(consumed_samples=1000)
        assert num_microbatches_calculator.get_num_microbatches() == 4
    finally:
        num_microbatches_calculator.unset_num_microbatches_calculator()
