# SPDX-License-Identifier: Apache-2.0
"""Saves that go on beside training: their threads, how they end, what is reported. They move no bytes."""
