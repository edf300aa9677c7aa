# SPDX-License-Identifier: Apache-2.0
"""Tests of FastSavePlanner and FastLoadPlanner."""
