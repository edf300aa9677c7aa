# SPDX-License-Identifier: Apache-2.0
"""The places where a run keeps its checkpoints: paths, trackers, catalog, retention."""
