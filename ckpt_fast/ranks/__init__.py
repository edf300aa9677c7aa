# SPDX-License-Identifier: Apache-2.0
"""Coordination between ranks: which rank this process is, and how a failure on one reaches the others."""
