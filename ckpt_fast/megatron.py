# SPDX-License-Identifier: Apache-2.0
"""Every name taken from Megatron-Core and from optional packages, felt once by feature.

Nothing else in ckpt_fast imports ``megatron``, ``nvidia_resiliency_ext``, ``multistorageclient`` or
``modelopt``. A name that the installed version lacks is None (a function to call when it is there) or a
harmless equivalent; ``HAVE_*`` tells whether a group is complete. Versions are never compared.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from abc import ABC
from collections.abc import Callable
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core import num_microbatches_calculator as _microbatches

# The vocabulary of a sharded state dict and its checks: identical in every supported version.
from megatron.core.dist_checkpointing import load, load_common_state_dict, load_content_metadata
from megatron.core.dist_checkpointing.core import CheckpointingException, check_is_distributed_checkpoint
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace, nested_values
from megatron.core.dist_checkpointing.mapping import (
    LocalNonpersistentObject,
    ShardedBase,
    ShardedObject,
    ShardedTensor,
    ShardedTensorFactory,
    apply_factories,
    apply_factory_merges,
    is_main_replica,
)
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess, save_preprocess
from megatron.core.dist_checkpointing.strategies import torch as torch_strategies
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue as MCoreAsyncCallsQueue
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest as MCoreAsyncRequest
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelLoadStrategyWrapper,
    FullyParallelSaveStrategyWrapper,
)
from megatron.core.dist_checkpointing.strategies.torch import (
    TorchDistLoadShardedStrategy,
    TorchDistSaveShardedStrategy,
)
from megatron.core.dist_checkpointing.validation import StrictHandling

# Training objects the documented API speaks about.
from megatron.core.msc_utils import MultiStorageClientFeature
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.layer_wise_optimizer import LayerWiseDistributedOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.tensor_parallel import (
    convert_cuda_rng_state,
    get_cuda_rng_tracker,
    is_graph_safe_cuda_rng_tracker,
)
from megatron.core.transformer import MegatronModule
from megatron.core.utils import get_model_config, get_pg_rank, get_pg_size, unwrap_model

__all__ = [
    "HAVE_MEGATRON_FSDP",
    "HAVE_NVRX",
    "HAVE_RESIL",
    "LOAD_PARAMETERS",
    "SAVE_PARAMETERS",
    "CheckpointingException",
    "DistributedOptimizer",
    "FullyParallelLoadStrategyWrapper",
    "FullyParallelSaveStrategyWrapper",
    "LayerWiseDistributedOptimizer",
    "LocalNonpersistentObject",
    "MCoreAsyncCallsQueue",
    "MCoreAsyncRequest",
    "MegatronFSDP",
    "MegatronModule",
    "MegatronOptimizer",
    "MultiStorageClientFeature",
    "NVRxAsyncRequest",
    "NVRxFileSystemWriterAsync",
    "ProcessGroupCollection",
    "ShardedBase",
    "ShardedObject",
    "ShardedTensor",
    "ShardedTensorFactory",
    "SoloGroup",
    "StrictHandling",
    "TorchDistLoadShardedStrategy",
    "TorchDistSaveShardedStrategy",
    "UnavailableError",
    "apply_factories",
    "apply_factory_merges",
    "check_is_distributed_checkpoint",
    "clean_metadata_for_serialization",
    "convert_cuda_rng_state",
    "dict_list_map_inplace",
    "dist_checkpointing",
    "gather_uneven_dtensor_to_full_tensor",
    "get_async_strategy",
    "get_cuda_rng_tracker",
    "get_model_config",
    "get_pg_collection",
    "get_pg_rank",
    "get_pg_size",
    "get_rerun_state_machine",
    "handle_experts_in_state_dict",
    "handle_fp8_extra_state_case",
    "handle_gdn_in_state_dict",
    "handle_mla_down_proj_in_state_dict",
    "handle_mtp_in_state_dict",
    "handle_swiglu_in_state_dict",
    "is_graph_safe_cuda_rng_tracker",
    "is_main_replica",
    "load",
    "load_common_state_dict",
    "load_content_metadata",
    "load_preprocess",
    "nested_values",
    "parallel_state",
    "preprocess_state_dict_for_uneven_dtensor",
    "print_diff_in_state_dicts",
    "restore_modelopt_state",
    "restore_sharded_modelopt_state",
    "safe_import",
    "save_modelopt_state",
    "save_preprocess",
    "save_sharded_modelopt_state",
    "save_state_dict_async_finalize",
    "save_state_dict_async_plan",
    "tensor_parallel",
    "torch_strategies",
    "unwrap_model",
    "update_num_microbatches",
    "validate_fsdp_dtensor_model_load",
]


# --- Optional imports ------------------------------------------------------------------------------------


class UnavailableError(ImportError):
    """A part of an optional package was used that is not installed; the text names the package."""


class _Unavailable:
    """Stands for a module that could not be imported; any use of it raises UnavailableError."""

    def __init__(self, name: str, cause: ImportError) -> None:
        self._name, self._cause = name, cause

    def _refuse(self) -> UnavailableError:
        return UnavailableError(f"{self._name} is needed here but cannot be imported: {self._cause}")

    def __getattr__(self, attribute: str) -> Any:
        # hasattr, copy and pickle probe for special names and must get the ordinary answer.
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        raise self._refuse() from self._cause

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise self._refuse() from self._cause


def safe_import(name: str) -> tuple[Any, bool]:
    """Import a module that may be missing.

    Returns:
        (module, True), or (placeholder that raises UnavailableError on use, False). Only ImportError is
        caught: a package that is present but broken says so.
    """
    try:
        return importlib.import_module(name), True
    except ImportError as error:
        return _Unavailable(name, error), False


def _names(module: str, *names: str) -> tuple[Any, ...]:
    """The named attributes of a module: all of them, or None for each when the module or one is missing."""
    found, present = safe_import(module)
    if not present or not all(hasattr(found, name) for name in names):
        return (None,) * len(names)
    return tuple(getattr(found, name) for name in names)


# --- dist_checkpointing: what differs between versions ---------------------------------------------------

# 0.17 added async_strategy, 0.19 verify_integrity and process_group, and 0.17 dropped common_strategy.
SAVE_PARAMETERS = frozenset(inspect.signature(dist_checkpointing.save).parameters)
LOAD_PARAMETERS = frozenset(inspect.signature(dist_checkpointing.load).parameters)


def clean_metadata_for_serialization(metadata: dict[str, Any] | None) -> dict[str, Any] | None:
    """A copy of the content metadata without its process group, which cannot be pickled."""
    if metadata is None:
        return None
    return {key: value for key, value in metadata.items() if key != "dp_cp_group"}


def get_async_strategy(async_strategy: str = "nvrx", module: str | None = None) -> tuple[str, Any]:
    """The queue, request and writer classes of "nvrx" or "mcore", as Megatron-Core 0.17 and later give them.

    Returns:
        (strategy, {class or function name: object}), or (strategy, that one object) when ``module`` is given.

    Raises:
        ModuleNotFoundError: "nvrx" without nvidia-resiliency-ext.
        TypeError: for any other name.
    """
    theirs = getattr(torch_strategies, "get_async_strategy", None)
    if theirs is not None:
        strategy, modules = theirs(async_strategy, module)
        return str(strategy), modules
    found = _async_modules(async_strategy)
    return async_strategy, found[module] if module else found


def _async_modules(async_strategy: str) -> dict[str, Any]:
    """Megatron-Core 0.16 has no ``get_async_strategy``; the classes it would hand out are there."""
    if async_strategy == "nvrx":
        package = "nvidia_resiliency_ext.checkpointing.async_ckpt"
        files = {"core": package + ".core"}
        if not HAVE_NVRX:
            raise ModuleNotFoundError(
                'async_strategy="nvrx" needs nvidia-resiliency-ext: install it, or use async_strategy="mcore"'
            )
    elif async_strategy == "mcore":
        package = "megatron.core.dist_checkpointing.strategies"
        files = {"core": package + ".async_utils"}
    else:
        raise TypeError(f"async_strategy={async_strategy!r}: use 'nvrx' or 'mcore'")
    core = importlib.import_module(files["core"])
    writer = importlib.import_module(package + ".filesystem_async")
    saver = importlib.import_module(package + ".state_dict_saver")
    reader = importlib.import_module(package + ".cached_metadata_filesystem_reader")
    # Both generations of both packages have the results queue, once with a leading underscore.
    results_queue = getattr(writer, "get_write_results_queue", None) or writer._get_write_results_queue
    return {
        "AsyncCallsQueue": core.AsyncCallsQueue,
        "AsyncRequest": core.AsyncRequest,
        "CachedMetadataFileSystemReader": reader.CachedMetadataFileSystemReader,
        "FileSystemWriterAsync": writer.FileSystemWriterAsync,
        "get_write_results_queue": results_queue,
        "save_state_dict_async_finalize": saver.save_state_dict_async_finalize,
        "save_state_dict_async_plan": saver.save_state_dict_async_plan,
    }


# --- Process groups --------------------------------------------------------------------------------------


class SoloGroup:
    """The group of one process, for programs that never initialised torch.distributed."""

    def rank(self) -> int:
        """Always 0."""
        return 0

    def size(self) -> int:
        """Always 1."""
        return 1


def get_pg_collection(model: Any) -> Any:
    """The process groups a model (or the first of a list of chunks) runs in.

    Its own ``pg_collection``, through wrappers; else Megatron's default groups; else, in a program that
    uses neither, every rank is a data-parallel rank of one whole model.
    """
    module = model[0] if isinstance(model, list) and model else model
    while module is not None and not isinstance(module, list):
        collection = getattr(module, "pg_collection", None)
        if collection is not None:
            return collection
        module = getattr(module, "module", None)
    if parallel_state.model_parallel_is_initialized():
        return ProcessGroupCollection.use_mpu_process_groups()
    solo: Any = SoloGroup()
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    data_parallel = torch.distributed.group.WORLD if distributed else solo
    names = dict.fromkeys(("tp", "pp", "mp", "cp", "tp_cp", "ep", "expt_tp", "tp_ep", "tp_ep_pp"), solo)
    names.update(dict.fromkeys(("dp", "dp_cp", "expt_dp"), data_parallel))
    return ProcessGroupCollection(**names)


def update_num_microbatches(consumed_samples: int, verbose: bool = False) -> None:
    """Bring the microbatch calculator to ``consumed_samples``; nothing where a program has none."""
    if _microbatches._GLOBAL_NUM_MICROBATCHES_CALCULATOR is not None:
        _microbatches.update_num_microbatches(consumed_samples=consumed_samples, verbose=verbose)


# --- Megatron FSDP (fsdp_dtensor checkpoints) ------------------------------------------------------------

_FSDP = "megatron.core.distributed.fsdp.src.megatron_fsdp"
_HANDLERS = "megatron.core.transformer.fsdp_dtensor_checkpoint"

(MegatronFSDP,) = _names(f"{_FSDP}.megatron_fsdp", "MegatronFSDP")
preprocess_state_dict_for_uneven_dtensor, gather_uneven_dtensor_to_full_tensor = _names(
    f"{_FSDP}.uneven_dtensor",
    "preprocess_state_dict_for_uneven_dtensor",
    "gather_uneven_dtensor_to_full_tensor",
)
(
    handle_experts_in_state_dict,
    handle_fp8_extra_state_case,
    handle_swiglu_in_state_dict,
    print_diff_in_state_dicts,
) = _names(
    _HANDLERS,
    "handle_experts_in_state_dict",
    "handle_fp8_extra_state_case",
    "handle_swiglu_in_state_dict",
    "print_diff_in_state_dicts",
)
HAVE_MEGATRON_FSDP = None not in (
    MegatronFSDP,
    preprocess_state_dict_for_uneven_dtensor,
    handle_experts_in_state_dict,
)

# Newer models' layouts. The last three came together: half of them would leave weights unmapped.
(handle_gdn_in_state_dict,) = _names(_HANDLERS, "handle_gdn_in_state_dict")
handle_mla_down_proj_in_state_dict, handle_mtp_in_state_dict, validate_fsdp_dtensor_model_load = _names(
    _HANDLERS,
    "handle_mla_down_proj_in_state_dict",
    "handle_mtp_in_state_dict",
    "validate_fsdp_dtensor_model_load",
)


# --- nvidia-resiliency-ext -------------------------------------------------------------------------------

HAVE_RESIL: bool = safe_import("nvidia_resiliency_ext.checkpointing")[1]

_NVRX = "nvidia_resiliency_ext.checkpointing.async_ckpt"
(_nvrx_request,) = _names(f"{_NVRX}.core", "AsyncRequest")
(NVRxFileSystemWriterAsync,) = _names(f"{_NVRX}.filesystem_async", "FileSystemWriterAsync")
save_state_dict_async_finalize, save_state_dict_async_plan = _names(
    f"{_NVRX}.state_dict_saver", "save_state_dict_async_finalize", "save_state_dict_async_plan"
)
HAVE_NVRX = None not in (_nvrx_request, NVRxFileSystemWriterAsync, save_state_dict_async_finalize)

# Without nvrx the class serves annotations only, so any class without behaviour does.
NVRxAsyncRequest: Any = _nvrx_request if HAVE_NVRX else ABC


# --- ModelOpt (quantised models) -------------------------------------------------------------------------

# Importing modelopt takes seconds and patches torch modules. A model can only carry ModelOpt state if the
# program imported modelopt itself, so saving never has a reason to import it first.


def _modelopt(name: str) -> Callable[..., Any]:
    function: Callable[..., Any] = getattr(importlib.import_module("modelopt.torch.opt.plugins"), name)
    return function


def save_modelopt_state(model: Any, state_dict: dict[str, Any]) -> None:
    """Put the model's ModelOpt state into ``state_dict``; nothing for a model that has none."""
    if "modelopt" in sys.modules:
        _modelopt("save_modelopt_state")(model, state_dict)


def save_sharded_modelopt_state(model: Any, checkpoint_name: str, strategy: Any) -> None:
    """Write the model's ModelOpt state to ``<checkpoint_name>/modelopt_state``; nothing if it has none."""
    if "modelopt" in sys.modules:
        _modelopt("save_sharded_modelopt_state")(model, checkpoint_name, strategy)


def restore_modelopt_state(model: Any, state_dict: dict[str, Any]) -> None:
    """Convert ``model`` as the checkpoint's ModelOpt state says.

    Raises:
        UnavailableError: the checkpoint has such state and modelopt is not installed.
    """
    if "modelopt_state" in state_dict:
        _require_modelopt()
    if "modelopt" in sys.modules:
        _modelopt("restore_modelopt_state")(model, state_dict)


def restore_sharded_modelopt_state(model: Any, checkpoint_name: str, prefix: str = "") -> None:
    """Convert ``model`` from ``<checkpoint_name>/modelopt_state``, which the caller knows to exist.

    Raises:
        UnavailableError: modelopt is not installed.
    """
    _require_modelopt()
    _modelopt("restore_sharded_modelopt_state")(model, checkpoint_name, prefix)


def _require_modelopt() -> None:
    if not safe_import("modelopt.torch.opt.plugins")[1]:
        raise UnavailableError(
            "this checkpoint was written by a model that nvidia-modelopt had converted: "
            "install nvidia-modelopt to load it"
        )
