# SPDX-License-Identifier: Apache-2.0
"""Processes that act together: which of them this is, and how a failure of one reaches the others."""
