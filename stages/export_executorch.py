"""A checkpoint as an ExecuTorch program (`.pte`) whose matrices run on XNNPACK: a prompt in, its logits out.

Matrices become torchao's unpacked INT4 tensors made from the codes and scales of `quant.apply.convert`; nothing is rounded
again before XNNPACK packs them. What then differs from ours is XNNPACK's: INT8 activations are asymmetric, one scale and
zero point a token, where ours are symmetric; and a block's scale is kept as bf16, where ours is fp16
(`docs/interchange.md` has by how much the logits move).

The program computes a whole prompt each time, without a key/value cache.
"""

from __future__ import annotations

import dataclasses
import json
import os
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_pipeline.tokenizer import Tokenizer
from modeling.attention import Layout
from modeling.config import ModelConfig
from modeling.decoder import Decoder
from modeling.layers import Linear, rope_frequencies, rope_tables
from quant.apply import convert, prepare, quantized_weights
from quant.spec import QuantSpec
from stages.errors import InputError
from stages.export_source import check_free, load_for_export

BLOCK = 32
"""XNNPACK's INT4 matrices have one scale for a multiple of this many weights."""
MAX_PROMPT = 2048
"""The most tokens a program takes; memory for them is planned when it is made."""


def export_executorch(checkpoint: str | Path, output: str | Path) -> None:
    """Write `output` from a run, checkpoint or Hugging Face folder; weights that no QAT trained are rounded to nearest.

    Raises:
        InputError: `output` exists, `executorch` is not installed, or XNNPACK cannot hold the model's integers.
        CheckpointError: the checkpoint is damaged.
    """
    check_free(Path(output))
    model, described = load_for_export(checkpoint)
    write_executorch_model(model, output, **described)


def write_executorch_model(
    model: Decoder, output: str | Path, *, quant: QuantSpec | None = None, tokenizer: Tokenizer | None = None,
    lineage: dict[str, Any] | None = None,
) -> None:  # fmt: skip
    """Write a model in memory, whole or not at all; `quant` is how it is prepared, None prepares it (in place).

    `forward` takes int64 tokens [1, T], T from 2 to the smaller of the model's context and 2048, and gives fp32 logits
    [1, T, V]. `get_vocab_size`, `get_max_seq_len`, `get_bos_id` and `get_eos_id` give numbers, -1 where there is none;
    `get_lineage` and `get_quantization` JSON.
    """
    output = Path(output)
    check_free(output)
    spec = quant or QuantSpec()
    _check_expressible(model.config, spec)
    try:
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import (
            XnnpackDynamicallyQuantizedPartitioner,
            XnnpackPartitioner,
        )
        from executorch.exir import to_edge_transform_and_lower
    except ImportError as error:
        raise InputError("--to executorch needs the package `executorch`; pip install pocketforge[interop]") from error
    if quant is None:
        prepare(model, spec)
    module = prompt_module(model)
    length = min(model.config.max_positions, MAX_PROMPT)
    example = torch.zeros(1, min(length, 8), dtype=torch.int64)
    dynamic = ({1: torch.export.Dim("length", min=2, max=length)},)
    with torch.no_grad(), warnings.catch_warnings():
        # What torch.export says to itself, dozens of times.
        warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)`", category=FutureWarning)
        program = torch.export.export(module, (example,), dynamic_shapes=dynamic)
        lowered = to_edge_transform_and_lower(
            program, partitioner=[XnnpackDynamicallyQuantizedPartitioner(), XnnpackPartitioner()],
            constant_methods={
                "get_vocab_size": model.config.vocab_size, "get_max_seq_len": length,
                "get_bos_id": _id(tokenizer, "bos"), "get_eos_id": _id(tokenizer, "eos"),
                "get_lineage": json.dumps(lineage or {}),
                "get_quantization": json.dumps({**dataclasses.asdict(spec), "trained": quant is not None}),
            },
        ).to_executorch()  # fmt: skip
    output.parent.mkdir(parents=True, exist_ok=True)
    part = output.with_name(f".{output.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            lowered.write_to_file(file)
        part.rename(output)
    finally:
        part.unlink(missing_ok=True)


def _check_expressible(config: ModelConfig, spec: QuantSpec) -> None:
    if config.output_tokens:
        raise InputError(f"the head says {config.head_size} of {config.vocab_size} tokens; a program holds whole heads")
    if config.moe is not None or config.rope_scaling is not None:
        part = "model.moe" if config.moe is not None else "model.rope_scaling"
        raise InputError(f"the model has {part}, which our ExecuTorch program does not; export it --to packed")
    if spec.weight_bits != 4 or spec.group_size % BLOCK:
        raise InputError(
            f"the model is quantized to {spec.weight_bits} bits in groups of {spec.group_size}; XNNPACK has 4 bits in groups "
            f"of a multiple of {BLOCK}"
        )
    sizes = {"hidden_size": config.hidden_size, "ffn_size": config.ffn_size, "num_heads * head_dim": config.query_size}
    for name, value in sizes.items():
        if value % spec.group_size:
            raise InputError(f"model.{name}={value} is not a multiple of the groups of {spec.group_size}")
    if config.max_positions < 2:
        raise InputError("model.max_positions=1; a program takes prompts of two tokens and more")


def _id(tokenizer: Tokenizer | None, role: str) -> int:
    found = None if tokenizer is None else getattr(tokenizer, f"{role}_id")
    return -1 if found is None else found


def prompt_module(model: Decoder) -> nn.Module:
    """A prepared model as a plain module for `torch.export`, its matrices torchao's INT4 tensors; shares its norms."""
    integers, specs = convert(model), quantized_weights(model)
    with torch.device("meta"):
        plain = Decoder(model.config)
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.requires_grad_(False)
    for name, module in plain.named_modules():
        if isinstance(module, Linear):
            # Ours may take oneDNN's product, which torchao's tensors know nothing of.
            module.__class__ = nn.Linear  # type: ignore[assignment]
            module.weight = _int4(*integers[f"{name}.weight"], specs[f"{name}.weight"])
    head: nn.Module
    if plain.head is not None:
        head = plain.head
    else:
        head = nn.Linear(model.config.hidden_size, model.config.vocab_size, bias=False, device="meta")
        tied = "embed.weight" in integers
        head.weight = _int4(*integers["embed.weight"], specs["embed.weight"]) if tied else plain.embed.weight
    embed = _IntegerEmbedding(*integers["embed.weight"]) if "embed.weight" in integers else plain.embed
    return _Prompt(plain, embed, head).eval()


def _int4(codes: Tensor, scales: Tensor, spec: QuantSpec) -> nn.Parameter:
    from torchao.quantization.quantize_.workflows.intx.intx_unpacked_to_int8_tensor import (
        IntxUnpackedToInt8Tensor,
        IntxUnpackedToInt8TensorActivationQuantization,
    )

    tensor = IntxUnpackedToInt8Tensor(
        qdata=codes, scale=scales.float(), zero_point=torch.zeros_like(scales, dtype=torch.int8),
        block_size=(1, spec.group_size),
        target_dtype=torch.int4, dtype=torch.float32,  # type: ignore[attr-defined]
        activation_quantization=IntxUnpackedToInt8TensorActivationQuantization.INT8_ASYM_PER_TOKEN,
    )  # fmt: skip
    return nn.Parameter(tensor, requires_grad=False)


class _IntegerEmbedding(nn.Module):
    """Rows of codes (a byte each) times their scales: the rounded table's rows, exactly."""

    codes: Tensor
    scales: Tensor

    def __init__(self, codes: Tensor, scales: Tensor) -> None:
        super().__init__()
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales.float())

    def forward(self, ids: Tensor) -> Tensor:
        groups = F.embedding(ids, self.scales)
        codes = F.embedding(ids, self.codes).float().unflatten(-1, (groups.shape[-1], -1))
        return (codes * groups.unsqueeze(-1)).flatten(-2)


class _Prompt(nn.Module):
    """The decoder's blocks on one row from its start, with RoPE and window looked up in tables.

    A table holds one position more than a prompt may have: a slice that is the whole table would be a special case of
    the exported program.
    """

    cos: Tensor
    sin: Tensor
    window: Tensor | None

    def __init__(self, plain: Decoder, embed: nn.Module, head: nn.Module) -> None:
        super().__init__()
        config = plain.config
        self.repeat = config.block_repeat
        self.embed, self.blocks, self.norm, self.head = embed, plain.blocks, plain.norm, head
        index = torch.arange(min(config.max_positions, MAX_PROMPT) + 1)
        cos, sin = rope_tables(index, rope_frequencies(config.head_dim, config.rope_theta), torch.float32)
        self.register_buffer("cos", cos[None, None])
        self.register_buffer("sin", sin[None, None])
        distance = index[:, None] - index
        seen = (distance >= 0) & (distance < config.window)
        self.register_buffer("window", seen if "window" in config.attention_kinds else None)

    def forward(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        masks = {"full": None, "window": None if self.window is None else self.window[None, None, :length, :length]}
        layout = Layout(self.cos[:, :, :length], self.sin[:, :, :length], masks)
        x = self.embed(tokens)
        for block in self.blocks:
            for _ in range(self.repeat):
                x = block(x, layout)
        return self.head(self.norm(x))
