# SPDX-License-Identifier: Apache-2.0
"""The contents that a run saves to and loads from a checkpoint, one module per kind of content."""
