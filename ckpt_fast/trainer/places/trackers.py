# SPDX-License-Identifier: Apache-2.0
"""The small files around a checkpoint: train state, run config, and the trackers that name the newest one.

A *tracker* lies in the root and says which iteration to resume from. It is replaced atomically and only
after everything it names is durable: train state and run config of the iteration first, trackers last.
"""

from __future__ import annotations

import contextlib
import copy
import errno
import io
import itertools
import logging
import os
import re
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from typing import Any, Generic, TypeVar

import torch

from ckpt_fast import settings
from ckpt_fast.config import ConfigContainer
from ckpt_fast.errors import CheckpointCorruptError, CheckpointWriteError, DamagedFileError, StorageError
from ckpt_fast.format.documents import parse_yaml
from ckpt_fast.format.names import METADATA_FILE
from ckpt_fast.pipeline.load.decode import decode_object
from ckpt_fast.pipeline.load.opened import OpenCheckpoint
from ckpt_fast.ranks.world import control_device, get_rank_safe, is_distributed, on_rank_0, warn_rank_0
from ckpt_fast.run import config_yaml
from ckpt_fast.state import TrainState
from ckpt_fast.storage import patience
from ckpt_fast.storage.commit import partial_files
from ckpt_fast.storage.objects.client import object_storage
from ckpt_fast.storage.small_files import LARGEST_TEXT
from ckpt_fast.storage.sole_writer import note_written, warn_of_another
from ckpt_fast.trainer.contents.run_config import apply_run_config_backward_compat, sanitize_run_config_object
from ckpt_fast.trainer.places.paths import (
    CONFIG_FILE,
    TRACKER_PREFIX,
    get_checkpoint_name,
    get_checkpoint_tracker_filename,
    get_checkpoint_train_state_filename,
    join_paths,
    read_file,
    write_file,
)

logger = logging.getLogger(__name__)

T = TypeVar("T")

# Beyond what the largest runs count, by factors of thousands.
_MOST_COUNTED = 1 << 53
_MOST_FLOPS = 1e33
_LARGEST = (1 << 63) - 1  # that ranks can compare

# (path, mtime in ns, size, inode): a file that was replaced within one clock tick has another inode.
_Stamp = tuple[str, int, int, int]


class CachedReader(Generic[T]):
    """Reads a small file on rank 0, once per version of it, and gives every rank a copy of its own.

    Only rank 0 keeps what it read, so ranks cannot disagree about whether a file is to be read again.
    Objects in object storage have no stamp to compare and are read each time.
    """

    def __init__(self, parse: Callable[[bytes, str], T], what: str) -> None:
        """``parse`` turns the content of a path into the value; ``what`` names the kind of file in errors."""
        self._parse = parse
        self._what = what
        self._cached = lru_cache(maxsize=16)(lambda stamp: parse(read_file(stamp[0]), stamp[0]))
        self.__doc__ = parse.__doc__

    def __call__(self, path: str) -> T:
        """The content of ``path``. Collective: all ranks call it.

        Raises:
            DamagedFileError: on every rank, if rank 0 cannot read or understand the file.
        """
        return on_rank_0(lambda: self._read_or_say(path))

    def cache_clear(self) -> None:
        """Forget what was read."""
        self._cached.cache_clear()

    def read(self, path: str) -> T:
        """The content of ``path``. Local.

        Raises:
            DamagedFileError: it cannot be read, or makes no sense.
            StorageError: object storage does not let anyone tell.
        """
        with self._damage(path):
            if object_storage(path):
                return self._parse(read_file(path), path)
            return copy.deepcopy(self._cached(_stamp(path)))

    def read_from(self, checkpoint: OpenCheckpoint, name: str) -> T:
        """The content of a file of a checkpoint that is open. Local; errors as of ``read``."""
        path = join_paths(checkpoint.name, name)
        with self._damage(path):
            return self._parse(checkpoint.read(name, LARGEST_TEXT), path)

    @contextlib.contextmanager
    def _damage(self, path: str) -> Iterator[None]:
        try:
            yield
        except StorageError:
            raise
        except Exception as error:
            raise DamagedFileError(
                f"Unable to load {self._what} file {path}: {error}. Restore the file, or load another "
                "checkpoint (ckpt_step, or the directory of one iteration)."
            ) from error

    def _read_or_say(self, path: str) -> T:
        try:
            return self.read(path)
        except DamagedFileError as error:
            sys.stderr.write(f"{error}\n")
            raise


def _stamp(path: str) -> _Stamp:
    status = os.stat(path)
    return path, status.st_mtime_ns, status.st_size, status.st_ino


def _parse_train_state(content: bytes, path: str) -> TrainState:
    """The progress counters of a run, from ``train_state.pt`` or the tracker ``latest_train_state.pt``."""
    train_state = TrainState()
    train_state.load_state_dict(decode_object(content, path, verify=True))
    _require_sensible(train_state)
    return train_state


def _require_sensible(train_state: TrainState) -> None:
    """Check that a run can be in this state.

    Raises:
        ValueError: naming the first value that is out of bounds.
    """
    for name, value in vars(train_state).items():
        if name.startswith("do_"):
            is_sensible = value in (0, 1)
        else:
            is_sensible = 0 <= value < (_MOST_FLOPS if name.endswith("so_far") else _MOST_COUNTED)
        if not is_sensible:
            raise ValueError(f"{name} is {value!r}, which is no state of a training run")


def _parse_run_config(content: bytes, path: str) -> Any:
    """The configuration a checkpoint was saved with, as plain dicts and lists; None for an empty file."""
    config = parse_yaml(content)
    sections = [config.get(name) for name in ("model", "checkpoint")] if isinstance(config, dict) else []
    if config is not None and not (sections and all(isinstance(each, dict | None) for each in sections)):
        raise ValueError("it is no configuration of a run: that has sections, with a name for each setting")
    return apply_run_config_backward_compat(sanitize_run_config_object(config))


read_train_state = CachedReader(_parse_train_state, "train state")
read_run_config = CachedReader(_parse_run_config, "config")


# --- Megatron-LM's tracker -------------------------------------------------------------------------------


def read_metadata(tracker_filename: str) -> tuple[int, bool]:
    """Read the tracker of Megatron-LM: the iteration, or the word "release".

    Every rank reads the file, and the largest iteration any of them saw is taken: a rank that a shared file
    system served an older or no file follows the others, with a warning. Collective.

    Returns:
        (iteration, False), or (0, True) for a release checkpoint.

    Raises:
        SystemExit: no rank found an iteration or "release" in the file.
        AssertionError: the iteration is not positive.
        OSError, CheckpointCorruptError: no rank could read the file.
    """
    iteration, problem = parse_tracker(tracker_filename)
    newest = _maximum(iteration)
    if newest < 0 and problem is not None:
        if isinstance(problem, ValueError):
            warn_rank_0(str(problem), logging.ERROR)
            sys.exit(1)
        raise problem
    if newest != iteration:
        logger.warning(
            "rank %d: %s; another rank found iteration %d, which all ranks use",
            get_rank_safe(),
            problem or f"the tracker {tracker_filename} says iteration {iteration}",
            newest,
        )
    return newest, newest == 0


def parse_tracker(path: str) -> tuple[int, Exception | None]:
    """Local. (iteration, None), with 0 for "release", or (-1, what is wrong with the file).

    Nothing is raised, since the file may look different on other ranks, which go on to a collective.
    """
    try:
        text = read_file(path).decode(errors="replace").strip()
        if text == "release":
            return 0, None
        if not re.fullmatch(r"-?[0-9]+", text):
            raise ValueError
        iteration = int(text)
        if iteration > _LARGEST:
            raise ValueError
    except ValueError:
        return -1, ValueError(f"the tracker {path} holds neither an iteration nor 'release': {text[:80]!r}")
    except (OSError, CheckpointCorruptError) as error:
        return -1, error
    if iteration <= 0:
        return -1, AssertionError(f"the tracker {path} holds iteration {iteration}; it must be positive")
    return iteration, None


def _maximum(value: int) -> int:
    """The largest ``value`` of any rank."""
    if not is_distributed():
        return value
    largest = torch.tensor([value], dtype=torch.long, device=control_device())
    torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX)
    return int(largest[0].item())


# --- Writing ---------------------------------------------------------------------------------------------


def snapshot_train_state(
    train_state: Any, floating_point_operations_so_far: float
) -> dict[str, torch.Tensor]:
    """The content of ``train_state.pt``, captured now because training continues while a save is in flight.

    The count of operations is kept in double precision (float32 would lose all but seven digits of it).
    """
    snapshot: dict[str, torch.Tensor] = dict(train_state.state_dict())
    snapshot["floating_point_operations_so_far"] = torch.tensor(
        floating_point_operations_so_far, dtype=torch.float64
    )
    return snapshot


def snapshot_run_config(cfg: Any) -> Callable[[], bytes]:
    """The content of ``run_config.yaml``: output of ``cfg.to_yaml(path)`` now. Text is made on demand."""
    if getattr(type(cfg), "to_yaml", None) is ConfigContainer.to_yaml:
        described = config_yaml.plain(cfg)
        return lambda: config_yaml.as_yaml(described).encode()
    with tempfile.TemporaryDirectory(prefix="ckpt_fast_") as directory:
        path = os.path.join(directory, CONFIG_FILE)
        cfg.to_yaml(path)
        with open(path, "rb") as file:
            content = file.read()
    return lambda: content


def encode_train_state(train_state: Mapping[str, torch.Tensor]) -> bytes:
    """The content of ``train_state.pt``, and of the tracker ``latest_train_state.pt``."""
    buffer = io.BytesIO()
    torch.save(dict(train_state), buffer)
    return buffer.getvalue()


def write_train_state(path: str, train_state: Mapping[str, torch.Tensor], *, sync_name: bool = True) -> None:
    """Write such a file atomically. Called on rank 0. For ``sync_name`` see ``write_file_atomic``."""
    write_file(path, encode_train_state(train_state), sync_name=sync_name)


_numbers = itertools.count()
# By directory, the number of the save that its trackers name.
_published: dict[str, int] = {}
_locks: dict[str, threading.Lock] = {}
_POLL_S = 0.05


def number_of_save() -> int:
    """A number for a save that begins now; later ones of this process are greater."""
    return next(_numbers)


def publish_trackers(
    save_dir: str, iteration: int, train_state: Mapping[str, torch.Tensor], number: int | None = None
) -> None:
    """Let the trackers of ``save_dir`` name ``iteration``. Called on rank 0, as the last write of a save.

    A background save may be finalized after one that started later, and then leaves the trackers as
    they are. What counts is when a save began, not its iteration: a run may go back.

    Everything the trackers name must be durable. A crash between the two leaves ``latest_train_state.pt``
    one save ahead of Megatron-LM's tracker; both name complete checkpoints then.

    Args:
        save_dir: where the trackers are.
        iteration: what they will name.
        train_state: of that iteration.
        number: of the save, from ``number_of_save``; None: it began now.
    """
    number = number_of_save() if number is None else number
    root = save_dir if object_storage(save_dir) else os.path.realpath(save_dir)
    with _alone(root):
        _publish(save_dir, root, iteration, train_state, number)


@contextlib.contextmanager
def _alone(root: str) -> Iterator[None]:
    """A block in which no other save of this process publishes in the same directory.

    A write that was given up may still arrive, however late. What is newer must be written after it.

    Raises:
        CheckpointWriteError: another save has not ended in time, or this one is not wanted any more.
    """
    lock = _locks.setdefault(root, threading.Lock())
    end = time.monotonic() + settings.timeout_s()
    while not lock.acquire(timeout=_POLL_S):
        if time.monotonic() > end or not patience.is_wanted():
            raise CheckpointWriteError(
                f"the trackers in {root} cannot be written: an earlier save, which was given up, is still "
                "writing to them. The checkpoint is complete, and is not named. See whether the storage "
                "answers.",
                errno.EBUSY,
                root,
            )
    try:
        yield
    finally:
        lock.release()


def _publish(
    save_dir: str, root: str, iteration: int, train_state: Mapping[str, torch.Tensor], number: int
) -> None:
    if number < _published.get(root, -1):
        logger.warning(
            "the checkpoint of iteration %d in %s is complete, but was begun before the one that the "
            "trackers name, and is not the one to resume from",
            iteration,
            save_dir,
        )
        return
    ours = get_checkpoint_train_state_filename(save_dir, prefix=TRACKER_PREFIX)
    write_train_state(ours, train_state, sync_name=False)
    tracker, content = get_checkpoint_tracker_filename(save_dir), str(iteration).encode()
    is_local = object_storage(save_dir) is None
    if is_local:
        warn_of_another(tracker)
    write_file(tracker, content)
    if is_local:
        note_written(tracker, content)
    _published[root] = number
    _sweep(save_dir, get_checkpoint_name(save_dir, iteration))


def _sweep(save_dir: str, checkpoint: str) -> None:
    """Remove the leftovers of dead publications next to the trackers: files older than this checkpoint."""
    if object_storage(save_dir):
        return
    with contextlib.suppress(OSError):
        begun = os.stat(os.path.join(checkpoint, METADATA_FILE)).st_mtime_ns
        for path in partial_files(save_dir, f"{TRACKER_PREFIX}_"):
            if os.stat(path).st_mtime_ns < begun:
                os.unlink(path)
