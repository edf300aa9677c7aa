# SPDX-License-Identifier: Apache-2.0
"""The steps of a save, from shards to a sealed checkpoint: plan, stage, encode, write, seal."""
