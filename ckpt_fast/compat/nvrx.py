# SPDX-License-Identifier: Apache-2.0
"""Saving in the background: the classes of nvidia-resiliency-ext and of Megatron-Core itself."""

from __future__ import annotations

import importlib
from abc import ABC
from typing import Any

from megatron.core.dist_checkpointing.strategies import torch as torch_strategies

from ckpt_fast.optional import import_names, safe_import

HAVE_RESIL: bool = safe_import("nvidia_resiliency_ext.checkpointing")[1]

_NVRX = "nvidia_resiliency_ext.checkpointing.async_ckpt"
(_nvrx_request,) = import_names(f"{_NVRX}.core", "AsyncRequest")
(NVRxFileSystemWriterAsync,) = import_names(f"{_NVRX}.filesystem_async", "FileSystemWriterAsync")
save_state_dict_async_finalize, save_state_dict_async_plan = import_names(
    f"{_NVRX}.state_dict_saver", "save_state_dict_async_finalize", "save_state_dict_async_plan"
)
HAVE_NVRX = None not in (_nvrx_request, NVRxFileSystemWriterAsync, save_state_dict_async_finalize)

# Without nvrx the class serves annotations only, so any class without behaviour does.
NVRxAsyncRequest: Any = _nvrx_request if HAVE_NVRX else ABC


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
    """Megatron-Core 0.16 has no ``get_async_strategy``, but has the classes it would return."""
    if async_strategy == "nvrx":
        if not HAVE_NVRX:
            raise ModuleNotFoundError(
                'async_strategy="nvrx" needs nvidia-resiliency-ext: install it, or use async_strategy="mcore"'
            )
        package, queue = _NVRX, "core"
    elif async_strategy == "mcore":
        package, queue = "megatron.core.dist_checkpointing.strategies", "async_utils"
    else:
        raise TypeError(f"async_strategy={async_strategy!r}: use 'nvrx' or 'mcore'")
    core = importlib.import_module(f"{package}.{queue}")
    writer = importlib.import_module(f"{package}.filesystem_async")
    saver = importlib.import_module(f"{package}.state_dict_saver")
    reader = importlib.import_module(f"{package}.cached_metadata_filesystem_reader")
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


def import_local_checkpointing() -> tuple[Any, Any]:
    """(LocalCheckpointManager, CliqueReplicationStrategy); imported late, because it asks for GPUs.

    Raises:
        ImportError: nvidia-resiliency-ext is missing.
    """
    package = "nvidia_resiliency_ext.checkpointing.local"
    manager = importlib.import_module(f"{package}.ckpt_managers.local_manager")
    replication = importlib.import_module(f"{package}.replication.strategies")
    return manager.LocalCheckpointManager, replication.CliqueReplicationStrategy


def import_basic_state_dict() -> Any:
    """nvidia-resiliency-ext's own tensor-aware state dict, for programs without Megatron-Core's.

    Raises:
        ImportError: nvidia-resiliency-ext is missing.
    """
    package = "nvidia_resiliency_ext.checkpointing.local"
    return importlib.import_module(f"{package}.basic_state_dict").BasicTensorAwareStateDict


def import_tensor_aware_state_dict() -> Any:
    """Megatron-Core's MCoreTensorAwareStateDict, the state dict that a local checkpoint manager takes.

    Raises:
        RuntimeError: nvidia-resiliency-ext, of which it is a subclass, is missing.
    """
    if not HAVE_RESIL:
        raise RuntimeError(
            "local checkpoints need nvidia_resiliency_ext: install nvidia-resiliency-ext, or use "
            "non_persistent_ckpt_type='global'"
        )
    module = importlib.import_module("megatron.core.dist_checkpointing.tensor_aware_state_dict")
    return module.MCoreTensorAwareStateDict
