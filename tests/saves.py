# SPDX-License-Identifier: Apache-2.0
"""Pipeline saves from a list of shards, with every option by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist

from ckpt_fast.format.types import Shard
from ckpt_fast.jobs.report import SaveReport
from ckpt_fast.pipeline.save.parts import Completion, SaveOptions, Share
from ckpt_fast.pipeline.save.save import Save


def new_save(
    shards: Sequence[Shard], directory: str, process_group: dist.ProcessGroup | None = None, **named: Any
) -> Save:
    """Return a save that is not staged yet; ``named`` are fields of Share, SaveOptions and Completion."""

    def fields_of(kind: type) -> dict[str, Any]:
        return {
            field.name: named.pop(field.name) for field in dataclasses.fields(kind) if field.name in named
        }

    share = Share(shards, **fields_of(Share))
    options, completion = SaveOptions(**fields_of(SaveOptions)), Completion(**fields_of(Completion))
    assert not named, f"no save knows {', '.join(named)}"
    return Save(directory, lambda: share, options, completion, process_group)


def save(shards: Sequence[Shard], directory: str, **named: Any) -> SaveReport:
    """Collective. Save and return when the checkpoint is durable and published."""
    job = new_save(shards, directory, **named)
    job.stage()
    job.write()
    return job.commit()
