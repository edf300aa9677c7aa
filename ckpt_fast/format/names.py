# SPDX-License-Identifier: Apache-2.0
"""Names in a checkpoint: of its files, and of what is ours in the files of others."""

METADATA_FILE = ".metadata"
SEAL_FILE = "metadata.json"
SIDECAR_FILE = "ckpt_fast.json"
DATA_SUFFIX = ".distcp"
# Of Megatron-Core: the part of a state dict that is not sharded; from 0.19 on in a data file, under the key.
COMMON_FILE = "common.pt"
COMMON_STATE_KEY = "common_state/shard_0_1"

# Kept on Metadata, where stock readers ignore it: archives are as ``archive.tensor_archive`` makes them.
LAYOUT_ATTRIBUTE = "ckpt_fast"
LAYOUT = {"layout": 1}

# The content of metadata.json. All four keys: Megatron-Core before 0.19 wants each and accepts no other.
SEAL = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
