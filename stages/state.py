"""What a training checkpoint holds, and how a stage comes back from it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_pipeline.tokenizer import Tokenizer
from modeling.config import ModelConfig
from quant.spec import QuantSpec
from stages.checkpoint import load_tensors, read_document, tensor_names, verify
from stages.config import StageName
from stages.distributed import Process
from stages.errors import CheckpointError
from stages.objectives import TeacherModel, TrainableModel
from stages.optim import named_parameters, optimizer_tensors


@dataclass(frozen=True, kw_only=True)
class RunState:
    """The document `state`: where in its stage a checkpoint was written, and on what."""

    stage: StageName
    step: int
    tokens: int
    """Tokens of this stage so far, padding included."""
    sequence: int
    """The loader's position: the global number of the next sequence."""
    seed: int
    data_fingerprint: str
    world: int
    global_batch: int

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def read(cls, checkpoint: Path) -> RunState:
        document = read_document(checkpoint, "state")
        try:
            return cls(**{item.name: document[item.name] for item in fields(cls)})
        except KeyError as error:
            raise CheckpointError(f"{checkpoint}: state has no {error}; expected a training checkpoint") from None


def model_document(config: ModelConfig, quant: QuantSpec | None) -> dict[str, Any]:
    return {**dataclasses.asdict(config), "quant": None if quant is None else dataclasses.asdict(quant)}


def read_model(checkpoint: Path) -> tuple[ModelConfig, QuantSpec | None]:
    """The model that a checkpoint is of, and how it was prepared for quantization."""
    document = dict(read_document(checkpoint, "model"))
    quant = document.pop("quant", None)
    try:
        return ModelConfig.from_plain(document), None if quant is None else QuantSpec(**quant)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{checkpoint}: its model is not one of ours ({error})") from None


def read_tokenizer(checkpoint: Path) -> Tokenizer:
    return Tokenizer.from_file(checkpoint / "tokenizer.json")


def model_tensors(module: TrainableModel | TeacherModel) -> dict[str, Tensor]:
    """Weights, and routers' balance biases, as `model.<name>`: the model's own storage (shards, under FSDP)."""
    weights = {name: parameter.detach() for name, parameter in named_parameters(module).items()}
    return weights | dict(module.named_buffers())


def training_tensors(module: TrainableModel, optimizer: torch.optim.Optimizer, process: Process) -> dict[str, Tensor]:
    """Everything a resumed run needs bit for bit: weights, optimizer, this rank's random numbers."""
    rng = {f"rng.{process.rank}": torch.get_rng_state()}
    if process.device.type == "cuda":
        rng[f"rng.{process.rank}.cuda"] = torch.cuda.get_rng_state(process.device)
    return {**model_tensors(module), **optimizer_tensors(module, optimizer), **rng}


def restore(checkpoint: Path, module: TrainableModel, optimizer: torch.optim.Optimizer, process: Process) -> None:
    """Load a checkpoint of the same stage in place, also one of another number of workers.

    A rank that the checkpoint has no random state for keeps its own: there is nothing to continue.
    """
    verify(checkpoint, process.rank, process.world)
    tensors = training_tensors(module, optimizer, process)
    known = set(tensor_names(checkpoint))
    rng = {name: tensor for name, tensor in tensors.items() if name.startswith("rng.") and name in known}
    load_tensors(checkpoint, {name: t for name, t in tensors.items() if not name.startswith("rng.")} | rng)
    for name, tensor in rng.items():
        torch.cuda.set_rng_state(tensor, process.device) if name.endswith("cuda") else torch.set_rng_state(tensor)


def load_weights(checkpoint: Path, tensors: dict[str, Tensor], process: Process) -> None:
    """Load only weights, named `model.<name>`, in place."""
    verify(checkpoint, process.rank, process.world)
    load_tensors(checkpoint, tensors)


@cache
def code_revision() -> str:
    """The git commit of this source tree, or empty where it is not a repository."""
    import subprocess

    command = ["git", "-C", str(Path(__file__).resolve().parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
