# SPDX-License-Identifier: Apache-2.0
"""Saves that run alongside training: their threads, how they end, their reports. Moves no bytes itself."""
