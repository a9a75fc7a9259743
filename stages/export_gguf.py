"""A checkpoint as one GGUF file that llama.cpp runs: the codes and scales that training saw, never rounded again.

llama.cpp builds its graphs in C++, one for each architecture it knows, so a model goes under the name of one that computes
the same (read in llama.cpp as of llama-cpp-python 0.3.36; `docs/interchange.md`):

| our model | architecture | how it is ours |
| --- | --- | --- |
| full attention | `llama` | RoPE rotates neighbours: rows of q and k are permuted inside each head, which is exact |
| with QK-norm | `qwen3` | norm weights of one; it norms before RoPE, which keeps norms; split-half RoPE, nothing is permuted |
| with `skip` blocks | `deci` | blocks of 0 heads have no attention; q and k permuted |
| with `window` blocks | `granite_swa` | scales of one, attention sinks of -1e30, which weigh exactly 0; q and k permuted |

Repeated blocks are written once for each time they run.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.tokenizer import Tokenizer
from modeling.config import ModelConfig
from modeling.decoder import Decoder
from modeling.hf_convert import interleave_heads
from quant.apply import convert_weight, prepare, quantized_weights
from quant.primitives import group_scales, quantize
from quant.spec import QuantSpec
from stages.errors import InputError
from stages.export_source import check_free, load_for_export
from stages.gguf_blocks import BLOCK, pack_q4_0, pack_q8_0
from stages.gguf_tokenizer import add_tokenizer

MAX_LAYERS = 512
"""llama.cpp's LLAMA_MAX_LAYERS."""
NO_SINK = -1e30
"""An attention sink's logit whose exponential is 0 beside any other."""
_BLOCK_NAMES = {
    **{f"attention.{part}": f"attn_{part}" for part in "qkv"}, "attention.o": "attn_output",
    **{f"feed_forward.{part}": f"ffn_{part}" for part in ("gate", "up", "down")},
    "attention_norm": "attn_norm", "feed_forward_norm": "ffn_norm",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class _Tensor:
    name: str
    shape: tuple[int, ...]
    bits: int
    """4 and 8 are integers in blocks, 32 floats."""
    make: Callable[[], NDArray[Any]]


def export_gguf(checkpoint: str | Path, output: str | Path) -> None:
    """Write `output` from a run, checkpoint or Hugging Face folder; weights that no QAT trained are rounded to nearest.

    Raises:
        InputError: `output` exists, `gguf` is not installed, or llama.cpp has no graph or no encoding for the model.
        CheckpointError: the checkpoint is damaged.
    """
    check_free(Path(output))
    model, described = load_for_export(checkpoint)
    write_gguf_model(model, output, **described)


def write_gguf_model(
    model: Decoder, output: str | Path, *, quant: QuantSpec | None = None, tokenizer: Tokenizer | None = None,
    lineage: dict[str, Any] | None = None,
) -> None:  # fmt: skip
    """Write a model in memory, whole or not at all; `quant` is how it is prepared, None prepares it (in place)."""
    output = Path(output)
    check_free(output)
    spec = quant or QuantSpec()
    name = architecture(model.config)
    _check_blocks(model.config, spec)
    try:
        from gguf import GGUFWriter, LlamaFileType
    except ImportError as error:
        raise InputError("--to gguf needs the package `gguf`; pip install pocketforge[interop]") from error
    if quant is None:
        prepare(model, spec)
    writer = GGUFWriter(None, name)
    writer.add_name(output.stem)
    writer.add_quantization_version(2)
    writer.add_file_type(LlamaFileType.MOSTLY_Q4_0 if spec.weight_bits == 4 else LlamaFileType.MOSTLY_Q8_0)
    _add_provenance(writer, {**dataclasses.asdict(spec), "trained": quant is not None}, lineage or {})
    _add_architecture(writer, model.config, name)
    add_tokenizer(writer, tokenizer, model.config.vocab_size)
    _write(writer, _tensors(model, name), output)


def architecture(config: ModelConfig) -> str:
    """The llama.cpp architecture that computes this model. InputError where none does, with the reason."""
    if config.output_tokens:
        raise InputError(f"the head says {config.head_size} of {config.vocab_size} tokens; llama.cpp has whole heads only")
    kinds = set(config.attention_kinds)
    if config.num_executed_layers > MAX_LAYERS:
        raise InputError(f"the model runs {config.num_executed_layers} blocks; llama.cpp goes up to {MAX_LAYERS}")
    if kinds == {"full"}:
        return "qwen3" if config.qk_norm else "llama"
    if config.qk_norm:
        raise InputError(f"the model has QK-norm and {min(kinds - {'full'})} blocks; we know no graph of llama.cpp with both")
    if kinds == {"full", "skip"}:
        if config.attention_kinds[0] == "skip":
            raise InputError("the first block has no attention; llama.cpp takes head sizes from the first block")
        return "deci"
    if kinds <= {"full", "window"}:
        return "granite_swa"
    raise InputError(f"the model has {' and '.join(sorted(kinds))} blocks; we know no graph of llama.cpp with windows "
                     "and blocks without attention")


def _check_blocks(config: ModelConfig, spec: QuantSpec) -> None:
    if config.moe is not None or config.rope_scaling is not None:
        part = "model.moe" if config.moe is not None else "model.rope_scaling"
        raise InputError(f"the model has {part}, which our GGUF files do not; export it --to packed")
    if spec.group_size % BLOCK:
        raise InputError(f"the model is quantized in groups of {spec.group_size}; GGUF's blocks of {BLOCK} hold groups of "
                         f"a multiple of {BLOCK}")
    sizes = {"hidden_size": config.hidden_size, "ffn_size": config.ffn_size, "num_heads * head_dim": config.query_size}
    for name, value in sizes.items():
        if value % spec.group_size:
            raise InputError(f"model.{name}={value} is not a multiple of the groups of {spec.group_size}")


def _add_provenance(writer: Any, quantization: dict[str, Any], lineage: dict[str, Any]) -> None:
    """general.quantization.* and general.lineage.*; what is unknown is left out."""
    for folder, values in (("quantization", quantization), ("lineage", lineage)):
        for key, value in values.items():
            key = f"general.{folder}.{key}"
            if isinstance(value, bool):
                writer.add_bool(key, value)
            elif isinstance(value, int):
                writer.add_uint64(key, value)
            elif value is not None:
                writer.add_string(key, str(value))


def _add_architecture(writer: Any, config: ModelConfig, name: str) -> None:
    kinds = [kind for kind in config.attention_kinds for _ in range(config.block_repeat)]
    writer.add_block_count(len(kinds))
    writer.add_context_length(config.max_positions)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.ffn_size)
    writer.add_vocab_size(config.vocab_size)
    skips = name == "deci"
    writer.add_head_count([0 if kind == "skip" else config.num_heads for kind in kinds] if skips else config.num_heads)
    writer.add_head_count_kv(
        [0 if kind == "skip" else config.num_kv_heads for kind in kinds] if skips else config.num_kv_heads
    )
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    if name == "granite_swa":
        writer.add_sliding_window(config.window)
        writer.add_sliding_window_pattern([kind == "window" for kind in kinds])
        writer.add_logit_scale(1.0)


def _tensors(model: Decoder, name: str) -> list[_Tensor]:
    config = model.config
    tensors = [_matrix(model, "embed", "token_embd")]
    if model.head is not None:
        tensors.append(_matrix(model, "head", "output"))
    executed = [block for block in range(config.num_layers) for _ in range(config.block_repeat)]
    for place, block in enumerate(executed):
        skips = config.attention_kinds[block] == "skip"
        for ours, theirs in _BLOCK_NAMES.items():
            if skips and ours.startswith("attention"):
                continue
            source, target = f"blocks.{block}.{ours}", f"blk.{place}.{theirs}"
            if ours.endswith("norm"):
                tensors.append(_vector(model, source, target))
            else:
                tensors.append(_matrix(model, source, target, ours in ("attention.q", "attention.k") and name != "qwen3"))
        if name == "qwen3":
            tensors += [_constant(f"blk.{place}.attn_{part}_norm", config.head_dim, 1.0) for part in "qk"]
        if name == "granite_swa":
            tensors.append(_constant(f"blk.{place}.attn_sinks", config.num_heads, NO_SINK))
    return [*tensors, _vector(model, "norm", "output_norm")]


def _constant(name: str, size: int, value: float) -> _Tensor:
    return _Tensor(f"{name}.weight", (size,), 32, lambda: np.full(size, value, np.float32))


def _vector(model: Decoder, source: str, target: str) -> _Tensor:
    values = model.get_parameter(f"{source}.weight")
    return _Tensor(f"{target}.weight", tuple(values.shape), 32, lambda: values.detach().float().cpu().numpy())


def _matrix(model: Decoder, source: str, target: str, permute: bool = False) -> _Tensor:
    """A table that training left alone (quant.embedding false) becomes INT8 with one scale a row."""
    weight = f"{source}.weight"
    spec = quantized_weights(model).get(weight)
    table = model.get_parameter(weight)
    bits = 8 if spec is None else spec.weight_bits

    def make() -> NDArray[Any]:
        if spec is None:
            per_row = QuantSpec(weight_bits=8, group_size=table.shape[1])
            scales = group_scales(table, per_row)
            codes = quantize(table, scales, per_row)
        else:
            codes, scales = convert_weight(model, weight)
        if permute:
            codes, scales = (interleave_heads(part, model.config.head_dim) for part in (codes, scales))
        return (pack_q4_0 if bits == 4 else pack_q8_0)(codes.cpu().numpy(), scales.cpu().numpy())

    return _Tensor(f"{target}.weight", tuple(table.shape), bits, make)


def _write(writer: Any, tensors: list[_Tensor], output: Path) -> None:
    """Names and sizes first, then one tensor at a time, to a file beside `output` that takes its name when it is whole."""
    from gguf import GGMLQuantizationType

    kinds = {4: GGMLQuantizationType.Q4_0, 8: GGMLQuantizationType.Q8_0}
    for tensor in tensors:
        *rows, width = tensor.shape
        size = 4 * width if tensor.bits == 32 else width // BLOCK * (2 + BLOCK * tensor.bits // 8)
        stored, kind = ((width,), np.float32) if tensor.bits == 32 else ((*rows, size), np.uint8)
        writer.add_tensor_info(
            tensor.name, stored, np.dtype(kind), size * int(np.prod(rows, dtype=np.int64)), kinds.get(tensor.bits)
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    part = output.with_name(f".{output.name}.{os.getpid()}.part")
    try:
        writer.write_header_to_file(part)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in tensors:
            writer.write_tensor_data(tensor.make())
        writer.close()
        part.rename(output)
    finally:
        part.unlink(missing_ok=True)
