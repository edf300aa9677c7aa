# SPDX-License-Identifier: Apache-2.0
"""The steps of a load, from files to filled tensors: open, plan, read, decode, place."""
