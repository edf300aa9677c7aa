# SPDX-License-Identifier: Apache-2.0
"""Where the checkpoints of a run are: paths, trackers, the list of what there is, retention."""
