# SPDX-License-Identifier: Apache-2.0
"""Whether what is stored is what was written: checkpoints of any writer, and all those of a run."""
