"""What a stage does, as data. `launch/config.py` puts these into a recipe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt, MinLen

from data_pipeline.config import DataConfig, HeldOutConfig
from quant.spec import QuantSpec

# Bounds are checked where a recipe is read (launch/config.py). The upper one keeps products of counts within 64 bits.
Positive = Annotated[int, Ge(1), Le(2**31 - 1)]
Natural = Annotated[int, Ge(0), Le(2**31 - 1)]
Share = Annotated[float, Ge(0), Le(1)]
Seed = Annotated[int, Ge(0), Le(2**63 - 1)]
StageName = Literal["pretrain", "midtrain", "sft", "qat"]
STAGES: tuple[StageName, ...] = ("pretrain", "midtrain", "sft", "qat")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW and its schedule."""

    __pydantic_config__ = {"extra": "forbid", "allow_inf_nan": False}

    lr: Annotated[float, Ge(0)]
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    warmup_steps: Natural = 0
    decay_steps: Natural = 0
    """Length of the final decay of `wsd`, in steps."""
    min_lr_ratio: Share = 0.0
    """Where the schedule ends, as a share of the peak."""
    beta1: Annotated[float, Ge(0), Lt(1)] = 0.9
    beta2: Annotated[float, Ge(0), Lt(1)] = 0.95
    eps: Annotated[float, Gt(0)] = 1e-8
    weight_decay: Annotated[float, Ge(0)] = 0.1
    """Applied to matrices, not to norm weights."""
    clip_norm: Annotated[float, Ge(0)] = 1.0
    """Largest global gradient norm; 0 does not clip."""


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """Forward KL to a teacher's logits, mixed with cross entropy."""

    __pydantic_config__ = {"extra": "forbid", "allow_inf_nan": False}

    teacher: Annotated[str, MinLen(1)]
    """`init` for the model the stage starts from (self-distillation), else a run, checkpoint or Hugging Face folder."""
    weight: Share = 1.0
    """Loss = weight * KL + (1 - weight) * cross entropy."""
    temperature: Annotated[float, Gt(0)] = 1.0


@dataclass(frozen=True, kw_only=True)
class MoETrainConfig:
    """How a mixture of experts trains: who may be dropped, how experts are kept busy."""

    __pydantic_config__ = {"extra": "forbid", "allow_inf_nan": False}

    dispatch: Literal["dropless", "capacity"] = "dropless"
    """`capacity` gives every expert the same number of slots and drops what does not fit; the rate is logged."""
    capacity_factor: Annotated[float, Gt(0), Le(1e6)] = 1.5
    """Slots of an expert as a multiple of an even share of a forward pass's tokens."""
    balance: Literal["bias", "loss", "none"] = "bias"
    """`bias` moves every expert's selection bias by its load (no auxiliary loss); `loss` is Switch Transformer's."""
    bias_rate: Annotated[float, Ge(0)] = 1e-3
    """How far a bias moves an optimizer step."""
    balance_weight: Annotated[float, Ge(0)] = 1e-2
    """Weight of the auxiliary loss, where `balance` is `loss`."""
    z_weight: Annotated[float, Ge(0)] = 1e-4
    """Weight of the squared log-sum-exp of the router's logits."""


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """One of the four stages."""

    __pydantic_config__ = {"extra": "forbid", "allow_inf_nan": False}

    data: DataConfig
    optim: OptimConfig
    steps: Positive
    seq_len: Positive
    """Tokens a row."""
    global_batch: Positive
    """Rows an optimizer step, over all workers."""
    micro_batch: Natural = 0
    """Rows a forward pass on one worker; 0 takes all of the worker's rows at once."""
    rope_theta: Annotated[float, Gt(0)] | None = None
    """Replaces the model's RoPE base from this stage on (context extension)."""
    max_positions: Positive | None = None
    distill: DistillConfig | None = None
    quant: QuantSpec | None = None
    moe: MoETrainConfig | None = None
    """For models with experts; None is the defaults."""

    def __post_init__(self) -> None:
        for name in ("steps", "seq_len", "global_batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What all stages of a run share."""

    __pydantic_config__ = {"extra": "forbid", "allow_inf_nan": False}

    steps: Positive | None = None
    """When given, every stage of this command takes this many optimizer steps."""
    log_every: Positive = 10
    """Steps between two lines of metrics.jsonl."""
    seed: Seed = 0
    held_out: tuple[HeldOutConfig, ...] = ()
    """Scored before and after every stage."""
    eval_every: Natural = 0
    """Also score the held-out sets every so many steps; 0 does not."""


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How a finished model is spread over workers."""

    __pydantic_config__ = {"extra": "forbid", "allow_inf_nan": False}

    replicate: Positive = 1
    """HSDP: groups that hold whole copies; the other workers shard within a group."""
    expert: Positive = 1
    """Expert parallelism: neighbouring workers that share out the experts of a mixture; the rest is sharded as ever."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Compute type of weights and activations; master weights, gradients' sum and optimizer stay fp32."""
    activation_checkpointing: Literal["none", "block"] = "none"
    compile: bool = False
    reshard_after_forward: bool = True
    library: Literal["torch", "torchtitan"] = "torch"
    """Who builds the mesh and clips the gradient: torch itself, or torchtitan's functions for the same."""
    timeout_seconds: Annotated[float, Gt(0), Le(1e9)] = 300.0
    """How long a collective waits for a lost worker."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When model, optimizer, loader position and RNG are saved."""

    __pydantic_config__ = {"extra": "forbid", "allow_inf_nan": False}

    every: Natural = 0
    """Steps between checkpoints; 0 saves at the end of a stage only."""
    keep: Positive = 2
    """Newest committed checkpoints kept in a stage."""
    asynchronous: bool = True
