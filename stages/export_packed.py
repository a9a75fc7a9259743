"""A checkpoint as one packed file for the runtime: the codes and scales that training saw, rearranged, never rounded again."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from data_pipeline.tokenizer import Tokenizer
from kernels.packed_file import PackedTensor, blob, f32, int4, int4_out, int8, write_packed
from kernels.packed_layout import GROUP
from kernels.runtime import crc32c
from modeling.config import ModelConfig
from modeling.decoder import Decoder
from modeling.layers import rope_frequencies
from quant.apply import convert_weight, prepare, quantized_weights
from quant.primitives import group_scales, quantize
from quant.spec import QuantSpec
from stages.errors import InputError
from stages.export_source import check_free, load_for_export

EmbeddingEncoding = Literal["int4", "int8"]


MOST = {"vocab_size": 2**24, "hidden_size": 2**18, "num_layers": 4096, "block_repeat": 16, "num_heads": 4096, "head_dim": 512,
        "ffn_size": 2**19, "max_positions": 2**24, "window": 2**24}  # fmt: skip
"""What `kernels/cpu/src/model.cpp` takes: from a stranger's file, larger sizes are an attack."""
MOST_OF_EXPERTS = {"num_experts": 4096, "top_k": 64, "expert_size": 2**19, "shared_size": 2**19}
"""The same of `model_moe.cpp`."""
MOST_OUT_COLUMNS = 16384


class NotPackable(InputError):
    """A model that the packed layout, or the runtime, cannot hold."""


def export_packed(checkpoint: str | Path, output: str | Path, embedding: EmbeddingEncoding | None = None) -> None:
    """Write `output` from a run, checkpoint or Hugging Face folder; weights that no QAT trained are rounded to nearest.

    Args:
        embedding: how the embedding (and a head) is stored; None takes INT4 where training rounded it so, else INT8 a row.

    Raises:
        InputError: `output` exists, or the runtime cannot hold the model. CheckpointError: the checkpoint is damaged.
    """
    model, described = load_for_export(checkpoint)
    pack_model(model, output, embedding=embedding, **described)


def pack_model(
    model: Decoder, output: str | Path, *, quant: QuantSpec | None = None, tokenizer: Tokenizer | None = None,
    lineage: dict[str, Any] | None = None, embedding: EmbeddingEncoding | None = None,
) -> None:  # fmt: skip
    """Write a model in memory; `quant` is how it is prepared already, None prepares it (in place) with the default spec."""
    output = Path(output)
    check_free(output)
    trained = quant is not None
    spec = quant or QuantSpec()
    _check_expressible(model.config, spec)
    if not trained:
        prepare(model, spec)
    encoding = embedding or ("int4" if spec.embedding else "int8")
    metadata = {
        "format": "pocketforge.packed",
        "model": model_metadata(model.config),
        "quantization": {**dataclasses.asdict(spec), "trained": trained, "embedding_encoding": encoding},
        "lineage": lineage or {},
        "tokenizer": None if tokenizer is None else "tokenizer.json",
    }
    write_packed(output, metadata, _tensors(model, encoding, embedding, tokenizer), crc32c)


def _check_expressible(config: ModelConfig, spec: QuantSpec) -> None:
    if spec.weight_bits != 4 or spec.group_size % GROUP:
        raise NotPackable(
            f"the model is quantized to {spec.weight_bits} bits in groups of {spec.group_size}; a packed file holds 4 bits "
            f"in groups of a multiple of {GROUP}"
        )
    if spec.activation_bits != 8:
        raise NotPackable("the model was trained with activations at 16 bits; the runtime rounds them to 8, train with "
                          "qat.quant.activation_bits=8")
    sizes = {"hidden_size": config.hidden_size, "ffn_size": config.ffn_size, "head_dim": config.head_dim}
    if config.moe is not None:
        sizes |= {"moe.expert_size": config.moe.expert_size, "moe.shared_size": config.moe.shared_size}
        if spec.expert_axis == "output" and max(config.hidden_size, config.moe.expert_size) > MOST_OUT_COLUMNS:
            raise NotPackable(f"experts of {config.hidden_size} to {config.moe.expert_size} with groups along their outputs; "
                              f"the runtime goes up to {MOST_OUT_COLUMNS}, train with qat.quant.expert_axis=input")
    for name, value in sizes.items():
        if value % GROUP:
            raise NotPackable(f"model.{name}={value} is not a multiple of {GROUP}, which the packed layout needs")
    limits = {name: (getattr(config, name), most) for name, most in MOST.items()}
    if config.moe is not None:
        limits |= {f"moe.{name}": (getattr(config.moe, name), most) for name, most in MOST_OF_EXPERTS.items()}
    for name, (value, most) in limits.items():
        if value > most:
            raise NotPackable(f"model.{name}={value}; the runtime goes up to {most}")
    if config.query_size > 2**19:
        raise NotPackable(f"model.num_heads={config.num_heads} of {config.head_dim}; the runtime goes up to {2**19} in all")
    if not 0 < np.float32(config.norm_eps) < 1:
        raise NotPackable(f"model.norm_eps={config.norm_eps}; the runtime takes what fp32 holds between 0 and 1")


def model_metadata(config: ModelConfig) -> dict[str, Any]:
    """`model` of the file's metadata."""
    fields = dataclasses.asdict(config)
    outputs = fields.pop("output_tokens")
    for name in ("init_std", "rope_scaling"):  # the second is in the frequencies
        del fields[name]
    if fields["moe"] is None:
        del fields["moe"]
    return {**fields, "attention": list(config.attention_kinds), **({"output_tokens": list(outputs)} if outputs else {})}


def _tensors(
    model: Decoder, encoding: str, embedding: str | None, tokenizer: Tokenizer | None
) -> Iterator[Callable[[], PackedTensor]]:
    yield partial(_embedding, model, "embed", encoding)
    if model.head is not None:
        # An untied head is a linear: training rounded it to INT4 even where it left the embedding alone.
        yield partial(_embedding, model, "head", embedding or "int4")
    for index, kind in enumerate(model.config.attention_kinds):
        name = f"blocks.{index}"
        if kind != "skip":
            yield partial(_vector, model, f"{name}.attention_norm")
            yield partial(_matrix, model, f"{name}.attention.qkv", [f"{name}.attention.{part}.weight" for part in "qkv"])
            yield partial(_matrix, model, f"{name}.attention.out", [f"{name}.attention.o.weight"])
        yield partial(_vector, model, f"{name}.feed_forward_norm")
        yield from _feed_forward(model, index)
    yield partial(_vector, model, "norm")
    config = model.config  # the runtime needs no power function of its own
    frequencies = rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
    yield lambda: f32("rope.inverse_frequencies", frequencies.numpy())
    if tokenizer is not None:
        yield lambda: blob("tokenizer.json", tokenizer.to_json().encode())


def _feed_forward(model: Decoder, index: int) -> Iterator[Callable[[], PackedTensor]]:
    """A block's feed-forward, or its router, each expert's two matrices side by side, and its shared expert."""
    name = f"blocks.{index}.feed_forward"
    moe = model.config.moe_at(index)
    dense = name if moe is None else f"{name}.shared"
    if moe is not None:
        for part, stored in (("router.weight", "router"), ("router.bias", "router_bias")):
            values = model.state_dict()[f"{name}.{part}"].float().cpu().numpy()
            yield partial(f32, f"{name}.{stored}", values)
        integers = cache(partial(convert_weight, model))  # of one layer at a time
        axis = quantized_weights(model)[f"{name}.experts.down"].expert_axis
        for expert in range(moe.num_experts):
            for part in ("gate_up", "down"):
                stored = f"blocks.{index}.experts.{expert}.{part}"
                yield partial(_expert, integers, f"{name}.experts.{part}", expert, stored, axis)
    if moe is None or moe.shared_size:
        yield partial(_matrix, model, f"{name}.gate_up", [f"{dense}.{part}.weight" for part in ("gate", "up")])
        yield partial(_matrix, model, f"{name}.down", [f"{dense}.down.weight"])


def _expert(integers: Callable[[str], tuple[Tensor, Tensor]], weight: str, expert: int, name: str, axis: str) -> PackedTensor:
    codes, scales = (part[expert].cpu().numpy() for part in integers(weight))
    scales = _per_group(scales, codes.shape[1])
    return int4(name, codes, scales) if axis == "input" else int4_out(name, codes.T, scales.T)  # [in, out] there


def _vector(model: Decoder, name: str) -> PackedTensor:
    return f32(name, model.get_parameter(f"{name}.weight").detach().float().cpu().numpy())


def _matrix(model: Decoder, name: str, parts: list[str]) -> PackedTensor:
    """The rows of one or more linears with the same input, one after the other."""
    codes, scales = zip(*(convert_weight(model, part) for part in parts), strict=True)
    return int4(name, _numpy(codes), _per_group(_numpy(scales), codes[0].shape[1]))


def _embedding(model: Decoder, name: str, encoding: str) -> PackedTensor:
    weight = f"{name}.weight"
    if encoding == "int4" and weight in quantized_weights(model):
        return _matrix(model, name, [weight])
    table = model.get_parameter(weight).detach()
    width = table.shape[1]
    spec = QuantSpec(weight_bits=8, group_size=width) if encoding == "int8" else QuantSpec()
    scales = group_scales(table, spec)
    codes = quantize(table, scales, spec)
    if encoding == "int8":
        return int8(name, _numpy([codes]), _numpy([scales])[:, 0].astype(np.float32))
    return int4(name, _numpy([codes]), _numpy([scales]))


def _numpy(parts: Any) -> Any:
    return torch.cat(list(parts)).cpu().numpy()


def _per_group(scales: Any, width: int) -> Any:
    """Scales of larger groups, once for each 32 weights."""
    return np.repeat(scales, width // GROUP // scales.shape[1], axis=1)
