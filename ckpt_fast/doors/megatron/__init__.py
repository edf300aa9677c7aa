# SPDX-License-Identifier: Apache-2.0
"""Megatron-Core's sharded state dicts and strategies on the pipeline."""
