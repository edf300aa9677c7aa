# SPDX-License-Identifier: Apache-2.0
"""Names and places of a checkpoint's files, on local disks and (``msc://...``) in object storage."""

from __future__ import annotations

import contextlib
import glob
import os
import re
from typing import Any

from ckpt_fast.format.documents import parse_yaml
from ckpt_fast.format.manifest import file_record
from ckpt_fast.format.types import FileRecord
from ckpt_fast.storage import objects
from ckpt_fast.storage.commit import fsync, fsync_directory, make_directory, write_file_atomic
from ckpt_fast.storage.objects.client import as_url, object_storage
from ckpt_fast.storage.small_files import LARGEST_FILE, LARGEST_TEXT, read_small_file

TRAIN_STATE_FILE = "train_state.pt"
TRACKER_PREFIX = "latest"
CONFIG_FILE = "run_config.yaml"
MEGATRON_LM_TRACKER = "latest_checkpointed_iteration.txt"

_ITERATION_DIR_MARKERS = (CONFIG_FILE, TRAIN_STATE_FILE, "metadata.json", ".metadata")

# A directory holds a whole HuggingFace model when it has a config and weights under one of these names.
_HF_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_HF_SHARDED_WEIGHTS = ("model-*-of-*.safetensors", "pytorch_model-*-of-*.bin")


# --- Storage: plain os calls, or multi-storage-client where it is enabled and the path is its own ---------


def file_exists(path: str) -> bool:
    """Whether a file or directory exists."""
    return objects.kind_of(path) is not None if object_storage(path) else os.path.exists(path)


def is_file(path: str) -> bool:
    """Whether ``path`` is a regular file (or an object)."""
    return objects.kind_of(path) == "file" if object_storage(path) else os.path.isfile(path)


def is_directory(path: str) -> bool:
    """Whether ``path`` is a directory, or a link to one; in object storage whether there is anything."""
    return objects.kind_of(path) is not None if object_storage(path) else os.path.isdir(path)


def read_file(path: str, limit: int = LARGEST_TEXT) -> bytes:
    """The content of a small file, wherever it is.

    Raises:
        CheckpointCorruptError: it is no regular file, or longer than ``limit``.
        OSError: it cannot be read; a StorageError if that is due to object storage.
    """
    return read_small_file(path, limit) if object_storage(path) is None else objects.read(path)


def write_file(path: str, data: bytes, *, sync_name: bool = True, make_directories: bool = True) -> None:
    """Create or replace a small file so that readers see its old content or the new, never a mixture.

    Directories are created when missing, if ``make_directories`` says so. Objects appear whole by nature of
    their storage. For ``sync_name`` see ``write_file_atomic``.

    Raises:
        CheckpointWriteError: with path and, on a local disk, errno.
    """
    if object_storage(path) is not None:
        objects.write(path, data)
        return
    if make_directories:
        ensure_directory_exists(path)
    write_file_atomic(path, data, sync_name=sync_name)


def names_in(directory: str, pattern: str) -> list[str]:
    """Names of files and directories in ``directory`` that match a glob pattern."""
    return [os.path.basename(path.rstrip("/")) for path in _glob(directory, pattern)]


def records_below(directory: str, name: str) -> list[FileRecord]:
    """The files in a directory of a checkpoint, by their paths in it; none without that directory."""
    below = join_paths(directory, name)
    if object_storage(below):
        paths = [each for each in _glob(below, "*") if is_file(each)]
    else:
        paths = [os.path.join(parent, each) for parent, _, names in os.walk(below) for each in names]
    records = []
    for path in sorted(paths):
        content = read_file(path, LARGEST_FILE)
        records.append(file_record(join_paths(name, path[len(below) :].lstrip("/")), content))
    return records


def remove_file(path: str) -> None:
    """Remove a file or object; nothing if there is none."""
    if object_storage(path) is not None:
        objects.delete(path)
        return
    with contextlib.suppress(FileNotFoundError):
        os.remove(path)


def sync_files(directory: str) -> None:
    """Make every file below a local directory durable: a tracker may name the checkpoint then."""
    for parent, _, names in os.walk(directory):
        for name in names:
            with open(os.path.join(parent, name), "rb") as file:
                fsync(file.fileno())
        fsync_directory(parent)


def ensure_directory_exists(filename: str, check_parent: bool = True) -> None:
    """Create the directory of a file, or with ``check_parent=False`` the directory ``filename`` itself.

    Like those above it that are missing, it outlives a power failure. Object storage has none.
    """
    directory = os.path.dirname(filename) if check_parent else filename
    if not directory:
        return
    if object_storage(directory) is None and not os.path.isdir(directory):
        make_directory(os.path.abspath(directory))


def join_paths(*paths: str) -> str:
    """Join path components; URLs keep their scheme.

    Raises:
        ValueError: without any component.
    """
    if not paths:
        raise ValueError("join_paths needs at least one path")
    return os.path.join(*(os.fspath(path) for path in paths))


# --- Roots -----------------------------------------------------------------------------------------------


def settle_directories(cfg: Any) -> None:
    """Let the configuration name its directories in one way: strings, absolute, without a slash at the end.

    They keep their meaning then if the program changes its directory, and can be compared. ``..`` stays:
    it may lead out of a link.
    """
    fields = {
        "checkpoint": ("save", "load", "pretrained_checkpoint", "non_persistent_global_ckpt_dir"),
        "dataset": ("dataloader_save", "dataloader_load"),
    }
    for section, names in fields.items():
        for name in names:
            value = getattr(getattr(cfg, section, None), name, None)
            if isinstance(value, (str, os.PathLike)) and os.fspath(value):
                setattr(getattr(cfg, section), name, settled(value))


def settled(path: str | os.PathLike[str]) -> str:
    """One path in the form that ``settle_directories`` gives it; an URL stays as it is."""
    name = as_url(path)
    if "://" in name:
        return name
    parts = [part for part in os.path.join(os.getcwd(), name).split("/") if part not in ("", ".")]
    return "/" + "/".join(parts)


# --- Names -----------------------------------------------------------------------------------------------


def get_checkpoint_name(checkpoints_path: str, iteration: int, release: bool = False) -> str:
    """``<root>/iter_0001000``, or ``<root>/release``."""
    return join_paths(checkpoints_path, "release" if release else f"iter_{iteration:07d}")


def get_checkpoint_train_state_filename(checkpoints_path: str, prefix: str | None = None) -> str:
    """``<root>/train_state.pt``, or ``<root>/<prefix>_train_state.pt``."""
    return join_paths(checkpoints_path, f"{prefix}_{TRAIN_STATE_FILE}" if prefix else TRAIN_STATE_FILE)


def get_checkpoint_run_config_filename(checkpoints_path: str) -> str:
    """``<root>/run_config.yaml``."""
    return join_paths(checkpoints_path, CONFIG_FILE)


def get_checkpoint_tracker_filename(checkpoints_path: str) -> str:
    """``<root>/latest_checkpointed_iteration.txt``, the tracker of Megatron-LM."""
    return join_paths(checkpoints_path, MEGATRON_LM_TRACKER)


# --- What a directory is ---------------------------------------------------------------------------------


def is_checkpoint_iteration_directory(path: str | None) -> bool:
    """Whether ``path`` is one checkpoint (``iter_0001000``), as opposed to a root of several."""
    return bool(path) and any(file_exists(join_paths(str(path), name)) for name in _ITERATION_DIR_MARKERS)


def checkpoint_exists(checkpoints_path: str | None) -> bool:
    """Whether ``checkpoints_path`` is a checkpoint, or a root with a tracker."""
    if not checkpoints_path:
        return False
    if is_checkpoint_iteration_directory(checkpoints_path):
        return True
    if file_exists(get_checkpoint_train_state_filename(checkpoints_path, prefix=TRACKER_PREFIX)):
        return True
    return is_file(get_checkpoint_tracker_filename(checkpoints_path))


def is_hf_checkpoint_dir(path: str | None) -> bool:
    """Whether ``path`` holds a whole HuggingFace model; a directory of adapters only does not count."""
    if not path or not file_exists(join_paths(path, "config.json")):
        return False
    if any(file_exists(join_paths(path, name)) for name in _HF_WEIGHTS):
        return True
    return any(_glob(path, pattern) for pattern in _HF_SHARDED_WEIGHTS)


def get_hf_model_id_from_checkpoint(path: str) -> str | None:
    """The HuggingFace model a checkpoint says it came from, or None when it does not say.

    Args:
        path: one checkpoint, or a root, of which the checkpoint with the highest iteration is asked.

    Raises:
        FileNotFoundError: ``path`` does not exist, or there is no ``run_config.yaml`` in it.
        NotADirectoryError: ``path`` is a file.
    """
    if not file_exists(path):
        raise FileNotFoundError(f"checkpoint directory {path} does not exist")
    if is_file(path):
        raise NotADirectoryError(f"{path} is a file; a checkpoint is a directory")
    config_file = get_checkpoint_run_config_filename(path)
    if not file_exists(config_file):
        children = _glob(path, "iter_*")
        if not children:
            raise FileNotFoundError(f"{path} has neither {CONFIG_FILE} nor iter_* directories")
        config_file = get_checkpoint_run_config_filename(max(children, key=iteration_of))
    model = (parse_yaml(read_file(config_file)) or {}).get("model") or {}
    extra = model.get("extra_checkpoint_metadata") or {}
    model_id = extra.get("hf_model_id") or model.get("hf_model_id")
    return str(model_id) if model_id else None


def _glob(directory: str, pattern: str) -> list[str]:
    if object_storage(directory) is not None:
        return objects.names_in(directory, pattern)
    return glob.glob(os.path.join(glob.escape(directory), pattern))


def iteration_of(directory: str) -> int:
    """The number in the name of a directory ``iter_*``; -1 if it has another name."""
    match = re.fullmatch(r"iter_([0-9]+)", os.path.basename(directory.rstrip("/")))
    return int(match[1]) if match else -1
