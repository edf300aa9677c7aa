# SPDX-License-Identifier: Apache-2.0
"""A training run of Megatron-Core, and the ways to save it in the background."""
