# SPDX-License-Identifier: Apache-2.0
"""A training run besides what it saves: configuration, loggers, signals, the queue of its saves."""
