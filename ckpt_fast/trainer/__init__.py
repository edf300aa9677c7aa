# SPDX-License-Identifier: Apache-2.0
"""Saving and restoring a training run: the home of the documented names and of the managers' inputs."""
