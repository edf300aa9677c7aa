# SPDX-License-Identifier: Apache-2.0
"""How frameworks save a model and its optimizer: each as its users call it, with the real package."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import state_dict as dcp_state
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

Futures = Sequence[Future[Any]]
_COLUMNS = 64


class Model(nn.Module):
    """Many small parameters.

    Args:
        tensors: how many.
        rows: of each, which has 64 columns.
    """

    def __init__(self, tensors: int, rows: int) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.weights = nn.ParameterList(torch.randn(rows, _COLUMNS) for _ in range(tensors))

    def forward(self) -> torch.Tensor:
        return torch.stack([weight.pow(2).mean() for weight in self.weights]).mean()


class Saver:
    """A framework, with a sharded model.

    Attributes:
        package: its name.
        starts_itself: it joins the process group that torchrun describes.
        model, optimizer: those that are trained.
    """

    package = "torch"
    starts_itself = False

    def __init__(self, model: Model) -> None:
        self.model: Any = fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
        self.optimizer: Any = torch.optim.AdamW(self.model.parameters())

    def save(self, path: Path) -> Futures:
        """Save; returns what goes on in the background. ``path`` is new every time."""
        raise NotImplementedError

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def close(self) -> None:
        """End what the framework has started, once all saves are done."""

    def state(self) -> dict[str, Any]:
        """Return what torch makes of the model and the optimizer for DCP."""
        model, optimizer = dcp_state.get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer}


class TorchThread(Saver):
    """``dcp.async_save`` as torch's tutorial has it, through a process group of its own."""

    _kind = "THREAD"

    def __init__(self, model: Model) -> None:
        super().__init__(model)
        self._group = dist.new_group(backend="gloo")

    def save(self, path: Path) -> Futures:
        from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

        kind = AsyncCheckpointerType[self._kind]
        return [
            dcp.async_save(
                self.state(), checkpoint_id=path, process_group=self._group, async_checkpointer_type=kind
            )
        ]


class TorchProcess(TorchThread):
    """The same with torch's other checkpointer."""

    _kind = "PROCESS"


class LightningFabric(Saver):
    package = "lightning"
    starts_itself = True

    def __init__(self, model: Model) -> None:
        from lightning.fabric import Fabric
        from lightning.fabric.strategies import ModelParallelStrategy

        self._fabric = Fabric(accelerator="cpu", devices=2, strategy=ModelParallelStrategy(_parallelize))
        self._fabric.launch()
        self.model = self._fabric.setup(model)
        self.optimizer = self._fabric.setup_optimizers(torch.optim.AdamW(self.model.parameters()))

    def save(self, path: Path) -> Futures:
        self._fabric.save(path, {"model": self.model, "optimizer": self.optimizer, "step": 1})
        return []

    def backward(self, loss: torch.Tensor) -> None:
        self._fabric.backward(loss)


class LightningTrainer(Saver):
    """``Trainer.save_checkpoint``, which is what its ModelCheckpoint calls, after a step of ``fit``."""

    package = "lightning"
    starts_itself = True

    def __init__(self, model: Model) -> None:
        import lightning
        from lightning.pytorch.strategies import ModelParallelStrategy

        class Module(lightning.LightningModule):
            def __init__(self) -> None:
                super().__init__()
                self.inner = model

            def configure_model(self) -> None:
                fully_shard(self.inner, mesh=self.device_mesh["data_parallel"])

            def configure_optimizers(self) -> torch.optim.Optimizer:
                return torch.optim.AdamW(self.parameters())

            def training_step(self, _: Any) -> torch.Tensor:
                loss: torch.Tensor = self.inner()
                return loss

        self._trainer = lightning.Trainer(
            accelerator="cpu",
            devices=2,
            strategy=ModelParallelStrategy(),
            max_steps=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        self._trainer.fit(Module(), torch.utils.data.DataLoader(range(2)))
        self.model = model
        (self.optimizer,) = self._trainer.optimizers

    def save(self, path: Path) -> Futures:
        self._trainer.save_checkpoint(path)
        return []


def _parallelize(model: nn.Module, mesh: Any) -> nn.Module:
    return fully_shard(model, mesh=mesh["data_parallel"])


class Accelerate(Saver):
    """What transformers' Trainer calls as well."""

    package = "accelerate"
    starts_itself = True

    def __init__(self, model: Model) -> None:
        from accelerate import Accelerator, FullyShardedDataParallelPlugin

        self._accelerator = Accelerator(cpu=True)
        super().__init__(model)
        self._plugin = FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type="SHARDED_STATE_DICT")

    def save(self, path: Path) -> Futures:
        from accelerate.utils import fsdp_utils

        fsdp_utils.save_fsdp_model(self._plugin, self._accelerator, self.model, path)
        fsdp_utils.save_fsdp_optimizer(self._plugin, self._accelerator, self.optimizer, self.model, path)
        return []


class TorchTitan(Saver):
    package = "torchtitan"
    _mode = "disabled"

    def __init__(self, model: Model) -> None:
        from torchtitan.components.checkpointer.dcp import CheckpointManager

        super().__init__(model)
        self._config = CheckpointManager.Config(
            enable=True, interval=1, async_mode=self._mode, last_save_model_only=False, keep_latest_k=0
        )
        self._managers: list[Any] = []

    def _manager(self, path: Path) -> Any:
        """Return a manager that saves below ``path``; torch's process and groups are made by the first."""
        from torchtitan.components.checkpointer.dcp import CheckpointManager

        if not self._managers:
            manager = CheckpointManager(
                self._config,
                dataloader=_Part(dict),
                model_parts=[self.model],
                optimizers=_Part(lambda: dcp_state.get_optimizer_state_dict(self.model, self.optimizer)),
                lr_schedulers=_Part(dict),
                states={},
                sd_adapter=None,
                base_folder=str(path.parent),
            )
            self._managers.append(manager)
        (manager,) = self._managers
        manager.folder = str(path)
        return manager

    def save(self, path: Path) -> Futures:
        manager = self._manager(path)
        manager.maybe_wait_for_saving()
        manager.save(2)
        return [] if manager.save_future is None else [manager.save_future]

    def close(self) -> None:
        for manager in self._managers:
            manager.maybe_wait_for_saving()
            manager.close()


class TorchTitanAsync(TorchTitan):
    _mode = "async"


class _Part:
    """A part of the state, as TorchTitan wants it."""

    def __init__(self, read: Any) -> None:
        self.state_dict = read

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise NotImplementedError


class Automodel(Saver):
    package = "nemo-automodel"

    def __init__(self, model: Model) -> None:
        from nemo_automodel.components.checkpoint.checkpointing import Checkpointer
        from nemo_automodel.components.checkpoint.config import CheckpointingConfig

        super().__init__(model)
        config = CheckpointingConfig(
            model_save_format="torch_save",
            model_repo_id="none",
            save_consolidated=False,
        )
        self._checkpointer = Checkpointer(config, dp_rank=dist.get_rank(), tp_rank=0, pp_rank=0)

    def save(self, path: Path) -> Futures:
        checkpointer = self._checkpointer
        checkpointer.save_model(self.model, str(path))
        checkpointer.save_optimizer(self.optimizer, self.model, str(path))
        return []

    def close(self) -> None:
        self._checkpointer.close()


class Torchtune(Saver):
    """The calls of its distributed recipes."""

    package = "torchtune"
    _in_background = False

    def __init__(self, model: Model) -> None:
        super().__init__(model)
        self._group = dist.new_group(backend="gloo")

    def save(self, path: Path) -> Futures:
        from torchtune.training.checkpointing import DistributedCheckpointer

        path.mkdir(parents=True, exist_ok=True)
        checkpointer = DistributedCheckpointer(
            checkpoint_dir=str(path), output_dir=str(path), process_group=self._group
        )
        checkpointer.save_checkpoint(self.state(), epoch=0, save_async=self._in_background)
        future = checkpointer._checkpoint_future
        return [] if future is None else [future]


class TorchtuneAsync(Torchtune):
    _in_background = True


SAVERS: dict[str, type[Saver]] = {
    "dcp.async_save, thread": TorchThread,
    "dcp.async_save, process": TorchProcess,
    "Lightning Fabric": LightningFabric,
    "Lightning Trainer": LightningTrainer,
    "Accelerate": Accelerate,
    "TorchTitan": TorchTitan,
    "TorchTitan, async": TorchTitanAsync,
    "Automodel": Automodel,
    "torchtune": Torchtune,
    "torchtune, async": TorchtuneAsync,
}
