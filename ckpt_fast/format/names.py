# SPDX-License-Identifier: Apache-2.0
"""Names in a checkpoint: of its files, and of what is ours in the files of others."""

METADATA_FILE = ".metadata"
SEAL_FILE = "metadata.json"
SIDECAR_FILE = "ckpt_fast.json"
DATA_SUFFIX = ".distcp"

# Kept on Metadata, where stock readers ignore it: archives are as ``archive.tensor_archive`` makes them.
LAYOUT_ATTRIBUTE = "ckpt_fast"
LAYOUT = {"layout": 1}
