# SPDX-License-Identifier: Apache-2.0
"""Train with megatron-core on a machine without a GPU.

megatron-core assumes CUDA in a few dozen places. None of them computes anything that a CPU cannot, so
``install()`` redirects them to the CPU. There are four kinds:

1. ``torch.cuda`` functions that wait for, or name, the current device;
2. ``device="cuda"`` and ``Tensor.cuda()`` for scalars that go through collectives (gloo wants them on the
   CPU);
3. ``Tensor.type()`` compared with ``"torch.cuda.FloatTensor"`` to tell parameters by precision;
4. the RNG tracker, which keeps CUDA generator states for dropout.

This belongs to the example, not to ckpt_fast: the library saves and loads without it. Stock
``megatron.core.dist_checkpointing`` needs it for both, because of the first two kinds. Transformer Engine,
CUDA graphs, fused kernels and the persistent writer process of megatron-core stay unavailable.

Works with megatron-core 0.16 to 0.19. Import this module before the first model is built::

    import cpu_megatron

    cpu_megatron.install()
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")


def install() -> None:
    """Make megatron-core run on the CPU in this process. Does nothing if there is a GPU, or if called again.

    Takes effect in the calling thread and in processes forked from it.
    """
    if torch.cuda.is_available() or _installed():
        return
    torch.cuda.synchronize = lambda device=None: None
    torch.cuda.current_device = lambda: _CPU
    torch.cuda.current_stream = lambda device=None: torch.cpu.current_stream()
    _use_cpu_rng_tracker()
    CudaMeansCpu().__enter__()  # for the rest of the process; it is never left


def _installed() -> bool:
    return any(isinstance(mode, CudaMeansCpu) for mode in torch.overrides._get_current_function_mode_stack())


class CudaMeansCpu(TorchFunctionMode):
    """While active, a torch function that is asked for a CUDA device uses the CPU.

    ``Tensor.type()`` names a CPU tensor as if it were on CUDA: megatron-core's optimizers sort parameters
    into 16-bit and 32-bit ones by that name alone.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.", 1)
        if func is torch.Tensor.to:
            args = tuple(_on_cpu(arg) for arg in args)
        if kwargs.get("device") is not None:
            kwargs = {**kwargs, "device": _on_cpu(kwargs["device"])}
        return func(*args, **kwargs)


def _on_cpu(device: Any) -> Any:
    """Return ``device``, or the CPU if it names a CUDA device; anything else is returned as is."""
    is_cuda = isinstance(device, (str, torch.device)) and str(device).startswith("cuda")
    return _CPU if is_cuda else device


def _use_cpu_rng_tracker() -> None:
    """Replace the tracker's class, so that ``model_parallel_cuda_manual_seed`` seeds a CPU tracker.

    Attention and parallel linear layers always enter the tracker, so a model cannot run without one. As
    its states are in ``get_states()``, a checkpoint stores them, and dropout continues where it stopped.
    """
    from megatron.core.tensor_parallel import random as megatron_random

    class CpuRNGStatesTracker(megatron_random.CudaRNGStatesTracker):
        """Named states of torch's CPU generator, with the interface of the CUDA tracker."""

        def add(self, name: str, seed: int) -> None:
            if name in self.states_ or seed in self.seeds_:
                raise ValueError(f"RNG state {name!r} or seed {seed} is already tracked")
            self._is_initialized = True
            self.seeds_.add(seed)
            self.states_[name] = torch.Generator().manual_seed(seed).get_state()

        @contextlib.contextmanager
        def fork(self, name: str = megatron_random._MODEL_PARALLEL_RNG_TRACKER_NAME) -> Iterator[None]:
            if name not in self.states_:
                raise KeyError(f"RNG state {name!r} is not tracked")
            outside = torch.get_rng_state()
            torch.set_rng_state(self.states_[name])
            try:
                yield
            finally:
                self.states_[name] = torch.get_rng_state()
                torch.set_rng_state(outside)

    megatron_random.CudaRNGStatesTracker = CpuRNGStatesTracker
    megatron_random.initialize_rng_tracker(force_reset=True)
