# SPDX-License-Identifier: Apache-2.0
"""What a run puts into a checkpoint and takes from it: a file for each kind of content."""
