"""torchtitan 0.2.2's own trainer on its Llama 3 model, on a CPU.

It needs two patches there (it assumes an accelerator, and gloo lacks one reduction): its device names are replaced in
every module that holds them, and its metrics processor, which asks for CUDA, by one that counts nothing.
"""

from __future__ import annotations

import dataclasses
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks import _shape as shape

_NAME = "pocketforge_benchmark"


class _Cpu:
    """What torchtitan asks of a device module."""

    @staticmethod
    def set_device(device: torch.device) -> None:
        """A process has one CPU device."""

    @staticmethod
    def current_device() -> int:
        return 0

    @staticmethod
    def synchronize() -> None:
        """Nothing runs behind the program's back."""

    @staticmethod
    def empty_cache() -> None:
        """There is no cache."""

    @staticmethod
    def memory_stats(device: Any = None) -> dict[str, int]:
        return {}

    @staticmethod
    def get_device_name(device: Any = None) -> str:
        return "cpu"

    @staticmethod
    def get_device_properties(device: Any = None) -> SimpleNamespace:
        return SimpleNamespace(total_memory=1)

    @staticmethod
    def reset_peak_memory_stats(device: Any = None) -> None:
        """Nothing is recorded."""


def _use_cpu() -> None:
    """The names are bound at import, so they are set again in every module already loaded."""
    import torchtitan.tools.utils
    import torchtitan.train  # noqa: F401  (loads what binds the names)

    for name, module in list(sys.modules.items()):
        if name.startswith("torchtitan"):
            for key, value in (("device_type", "cpu"), ("device_module", _Cpu)):
                if hasattr(module, key):
                    setattr(module, key, value)


class _Rows:
    """The shared rows as its data loader."""

    def __init__(self, folder: Path) -> None:
        self.rows = shape.load_rows(folder)

    def __iter__(self) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        for tokens, labels in zip(self.rows["tokens"], self.rows["labels"], strict=True):
            yield {"input": tokens}, labels

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The rows are always read from the first."""


class _NoMetrics:
    """Its metrics processor without the device's memory, for the attributes that the trainer touches."""

    def __init__(self, *_: Any) -> None:
        from torchtitan.tools.utils import NoColor

        self.color = NoColor()
        self.num_flops_per_token = 0
        self.ntokens_since_last_log = 0
        self.data_loading_times: list[float] = []
        stats = SimpleNamespace(max_reserved_gib=0.0, max_reserved_pct=0.0)
        self.device_memory_monitor = SimpleNamespace(
            device_name="cpu", get_peak_stats=lambda: stats, reset_peak_stats=lambda: None
        )
        self.optimizers: Any = None
        self.model_parts: Any = None
        self.loss = float("nan")

    def should_log(self, step: int) -> bool:
        return step == 1

    def log(self, step: int, global_avg_loss: float, *_: Any, **__: Any) -> None:
        self.loss = global_avg_loss

    def close(self) -> None:
        """Nothing was opened."""


def train(folder: Path, steps: int, clock: shape.StepClock) -> None:
    """Runs its trainer for `steps` steps. Its Llama has no tied head: more parameters for the optimizer than ours."""
    _set_environment()
    _use_cpu()
    from torchtitan.models.llama3 import TransformerModelArgs, get_train_spec
    from torchtitan.protocols.train_spec import register_train_spec
    from torchtitan.train import Trainer

    model = shape.MODEL
    arguments = TransformerModelArgs(
        dim=model.hidden_size, n_layers=model.num_layers, n_heads=model.num_heads, n_kv_heads=model.num_kv_heads,
        vocab_size=model.vocab_size, multiple_of=model.ffn_size, norm_eps=model.norm_eps, rope_theta=model.rope_theta,
    )  # fmt: skip
    spec = dataclasses.replace(
        get_train_spec(),
        model_args={"same": arguments},
        build_tokenizer_fn=None,
        build_dataloader_fn=lambda **_: _Rows(folder),
        build_metrics_processor_fn=_NoMetrics,
        state_dict_adapter=None,
    )
    register_train_spec(_NAME, spec)
    trainer = Trainer(_config(folder, steps))
    width = trainer.model_parts[0].layers["0"].feed_forward.w1.out_features
    if width != model.ffn_size:
        raise RuntimeError(f"torchtitan chose a feed-forward width of {width}; expected {model.ffn_size}")
    try:
        trainer.train()
        shape.report(folder, "torchtitan_trainer", clock, steps, first_loss=trainer.metrics_processor.loss)
    finally:
        trainer.close()
        torch.distributed.destroy_process_group()


def _config(folder: Path, steps: int) -> Any:
    from torchtitan.config import JobConfig

    config, optim = JobConfig(), shape.OPTIM
    config.job.dump_folder = str(folder / "torchtitan")
    config.model.name, config.model.flavor = _NAME, "same"
    config.training.local_batch_size, config.training.seq_len = shape.ROWS, shape.SEQ_LEN
    config.training.steps = steps
    config.training.max_norm = optim.clip_norm
    config.training.mixed_precision_param = "float32"  # its default is bfloat16; all contenders compute in fp32
    config.optimizer.lr, config.optimizer.eps = optim.lr, optim.eps
    config.optimizer.beta1, config.optimizer.beta2 = optim.beta1, optim.beta2
    config.optimizer.weight_decay = optim.weight_decay
    config.optimizer.implementation = "fused"
    config.lr_scheduler.warmup_steps = optim.warmup_steps
    config.debug.seed = shape.SEED
    return config


def _set_environment() -> None:
    """It reads its rank from torchrun's variables."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port)}  # fmt: skip
