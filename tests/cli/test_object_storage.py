# SPDX-License-Identifier: Apache-2.0
"""The commands on checkpoints in object storage."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ckpt_fast.compat import MultiStorageClientFeature
from tests.cli.running import in_pipe
from tests.helpers import run_ranks
from tests.object_server import ObjectServer
from tests.trainer.objects.bucket import Bucket, new_bucket, train_and_save


def save(rank: int, bucket: Bucket) -> None:
    with bucket.in_use():
        train_and_save(bucket, 3)


def test_commands_in_object_storage(
    object_server: ObjectServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That a path is named is enough: object storage need not be enabled before."""
    bucket = new_bucket(object_server, tmp_path)
    run_ranks(save, 1, bucket)
    with bucket.in_use():
        monkeypatch.setattr(MultiStorageClientFeature, "_enabled", False)
        found = in_pipe("inspect", bucket.url, "--json")
        assert found.status == 0, found.err
        assert (found.value["path"], found.value["format"]) == (bucket.of(3), "torch_dist")
        name = found.value["tensors"][0]["name"]
        assert in_pipe("inspect", bucket.of(2), "--tensor", name, "--json").value["count"] > 0
        listed = in_pipe("ls", bucket.url, "--json").value
        assert [(each["iteration"], each["is_selected"]) for each in listed] == [
            (1, False),
            (2, False),
            (3, True),
        ]
        assert all(each["is_complete"] and each["nbytes"] > 0 for each in listed)
        assert in_pipe("convert", bucket.of(3), tmp_path / "local", "--to", "torch_dist").status == 0
        assert in_pipe("diff", bucket.of(3), tmp_path / "local").status == 0
        assert in_pipe("diff", bucket.of(3), bucket.of(2)).status == 1
        assert in_pipe("prune", bucket.url, "--keep", 1).status == 0
        assert in_pipe("inspect", f"{bucket.url}/nowhere").status == 2
    assert bucket.iterations() == [3]
    assert os.listdir(bucket.spool) == []
