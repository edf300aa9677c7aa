# SPDX-License-Identifier: Apache-2.0
"""The rest of a training run, apart from its saved state: configuration, loggers, signals, save queue."""
