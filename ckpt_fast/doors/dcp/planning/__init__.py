# SPDX-License-Identifier: Apache-2.0
"""Planners for ``dcp.save`` and ``dcp.load`` whose plans are columns, and what the storage has to know."""
