# SPDX-License-Identifier: Apache-2.0
"""Small files that a load needs, and that no manifest vouches for: are they there, do they make sense?"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from ckpt_fast.errors import CheckpointCorruptError, UnsafeCheckpointError
from ckpt_fast.format.documents import parse_json, parse_yaml
from ckpt_fast.format.names import SEAL_FILE
from ckpt_fast.pipeline.load.decode import decode_object
from ckpt_fast.verification.content import require_readable
from ckpt_fast.verification.findings import Findings
from ckpt_fast.verification.places import COMMON_FILE, CONFIG_FILE, TRAIN_STATE_FILE
from ckpt_fast.verification.report import State

# Megatron-Core from 0.19 on keeps the common state in a data file, under this name.
COMMON_STATE_KEY = "common_state/shard_0_1"
_SEAL = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
_NEEDED_IN_SEAL = ("sharded_backend", "sharded_backend_version")


def check_needed(found: Findings, names: Collection[str], *, is_torch_dist: bool, of_a_run: bool) -> None:
    """Check the files that a load of such a checkpoint reads besides the data.

    Args:
        found: takes the findings; what a manifest has vouched for is known to it already.
        names: of all tensors and objects.
        is_torch_dist: whether Megatron-Core reads it.
        of_a_run: whether a training run has saved it, with its counters and its configuration.
    """
    if is_torch_dist:
        _check(found, SEAL_FILE, _check_seal)
        if COMMON_FILE in found.sizes or COMMON_STATE_KEY not in names:
            _check(found, COMMON_FILE, _check_common)
    if of_a_run:
        _check(found, TRAIN_STATE_FILE, check_train_state)
        _check(found, CONFIG_FILE, _check_config)


def check_train_state(content: bytes) -> int:
    """The iteration in the counters of a run.

    Raises:
        ValueError, RuntimeError: they make no sense.
        CheckpointCorruptError, UnsafeCheckpointError: as of ``decode_object``.
    """
    state = decode_object(content, TRAIN_STATE_FILE, verify=True)
    require_readable(content)
    try:
        return int(state["step"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError("it holds no counters of a run") from error


def _check(found: Findings, name: str, check: Callable[[bytes], Any]) -> None:
    if found.state_of(name) is not None:
        return
    content = found.read(name)
    if content is None:
        return
    if not content:
        found.file(name, State.TRUNCATED, "is empty")
        return
    try:
        check(content)
    except UnsafeCheckpointError as error:
        found.file(name, State.UNDECODED, f"was not decoded ({error})")
    except CheckpointCorruptError as error:
        found.file(name, State.FLIPPED, f"is damaged ({error})")
    except Exception as error:  # PyYAML's are of no common type with those of others
        found.file(name, State.FLIPPED, f"is damaged ({type(error).__name__}: {error})")
    else:
        found.file(name, State.SOUND)


def _check_seal(content: bytes) -> None:
    seal = parse_json(content)
    if not isinstance(seal, dict):
        raise ValueError("it holds no names")
    for key in _NEEDED_IN_SEAL:
        if key not in seal:
            raise ValueError(f"it does not name {key}")
    for key, value in seal.items():
        if key in _SEAL and value != _SEAL[key]:
            raise ValueError(f"it names {value!r} as {key}, not {_SEAL[key]!r}")
        # Later versions may have more to say.
        resembled = next((known for known in _SEAL if key not in _SEAL and _differ_in_one(key, known)), None)
        if resembled is not None:
            raise ValueError(f"it names {key!r} where {resembled!r} must stand")


def _differ_in_one(one: str, other: str) -> bool:
    return len(one) == len(other) and sum(a != b for a, b in zip(one, other, strict=True)) == 1


def _check_common(content: bytes) -> None:
    state = decode_object(content, COMMON_FILE, verify=True)
    require_readable(content)
    if not isinstance(state, Mapping):
        raise ValueError(f"it holds a {type(state).__name__}, not a state dict")


def _check_config(content: bytes) -> None:
    config = parse_yaml(content)
    sections = [config.get(name) for name in ("model", "checkpoint")] if isinstance(config, dict) else []
    if not sections or not all(isinstance(each, dict | None) for each in sections):
        raise ValueError("it is no configuration of a run")
