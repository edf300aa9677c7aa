# SPDX-License-Identifier: Apache-2.0
"""Runs of one and two ranks that are killed over and over, and resume each time."""
