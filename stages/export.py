"""Conversion of a checkpoint to a folder that `transformers` loads, tokenizer and chat template included."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from data_pipeline.chat import LLAMA3_TEMPLATE, layout_name
from data_pipeline.errors import DataError
from data_pipeline.tokenizer import Tokenizer
from modeling.decoder import Decoder
from modeling.hf_convert import Integers, Layout, save_hf
from quant.apply import convert, prepare
from quant.primitives import QuantError
from quant.spec import QuantSpec
from stages.export_source import check_free
from stages.loading import LoadedModel, load_model

CHAT_TEMPLATES = {
    "llama3": LLAMA3_TEMPLATE,
    "chatml": (
        "{{ bos_token }}{% for message in messages %}"
        "{{ '<|im_start|>' + ('assistant' if message['role'] == 'tool_call' else message['role'])"
        " + '\\n' + message['content'] | trim + '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    "plain": (
        "{{ bos_token }}{% for message in messages %}"
        "{{ ('assistant' if message['role'] == 'tool_call' else message['role']) | capitalize"
        " + ':\\n' + message['content'] | trim + eos_token + '\\n\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'Assistant:\\n' }}{% endif %}"
    ),
}
"""The layouts of `data_pipeline.chat` as Jinja; tests hold them equal to `render`."""


def export_hf(checkpoint: str | Path, output: str | Path, layout: Layout | None = None) -> None:
    """Write config.json, model.safetensors, tokenizer files and lineage.json, all or nothing.

    Weights of a QAT checkpoint are written on their integer grid (in fp32), so that any fp32 runtime sees what training
    saw; that activations are rounded too is recorded in lineage.json and lost on transformers. The layout mobilemoe-int4
    holds the integers themselves.

    Raises:
        InputError: `output` exists. CheckpointError: the checkpoint is damaged. ConversionError, QuantError: the layout
            cannot hold the model.
    """
    output = Path(output)
    check_free(output)
    loaded = load_model(checkpoint, latent=layout == "mobilemoe-int4")
    output.parent.mkdir(parents=True, exist_ok=True)

    def add_rest(folder: Path, config: dict[str, Any]) -> None:
        ids = special_ids(loaded.tokenizer)
        config.update(ids)
        _write(folder / "generation_config.json", {**ids, "do_sample": False})
        write_tokenizer(folder, loaded.tokenizer, loaded.context)
        _write(folder / "lineage.json", _lineage(loaded))

    write_hf_model(loaded.model, output, layout, loaded.quant, add_rest)


@torch.no_grad()
def write_hf_model(
    model: Decoder, output: Path, layout: Layout | None = None, quant: QuantSpec | None = None,
    extra: Callable[[Path, dict[str, Any]], None] | None = None,
) -> None:  # fmt: skip
    """The folder of a model in memory, with what `extra` adds. For the layout mobilemoe-int4 give the latent weights, and
    how training rounded them; that layout prepares a model that no QAT trained, in place."""
    wanted = layout == "mobilemoe-int4" and model.config.moe is not None
    integers = int4_integers(model, quant) if wanted else None
    save_hf(output, model.config, model.state_dict(), layout=layout, integers=integers, extra=extra)


def int4_integers(model: Decoder, quant: QuantSpec | None) -> Integers:
    """Codes and scales of the layout mobilemoe-int4: training's, or of a model that no QAT trained those rounded to nearest.

    Raises:
        QuantError: training rounded to another grid than that layout's, or a row that groups of 32 do not fill.
    """
    spec = quant or QuantSpec(expert_axis="output")
    if (spec.weight_bits, spec.group_size, spec.embedding, spec.expert_axis) != (4, 32, True, "output"):
        raise QuantError("the mobilemoe-int4 layout is INT4 in groups of 32, embedding too, experts in groups along their "
                         f"output (quant.expert_axis=output); the model was trained with {spec}")
    return convert(prepare(model, spec))


def _lineage(loaded: LoadedModel) -> dict[str, Any]:
    quant = None if loaded.quant is None else dataclasses.asdict(loaded.quant)
    return {**(loaded.lineage.to_dict() if loaded.lineage else {}), "checkpoint": str(loaded.path), "quant": quant}


def special_ids(tokenizer: Tokenizer) -> dict[str, Any]:
    """Ids as config.json names them; generation stops at the end of a text and at the end of a turn."""
    ends = list(dict.fromkeys(i for i in (tokenizer.eos_id, tokenizer.eot_id) if i is not None))
    return {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        "pad_token_id": tokenizer.pad_id,
    }


def write_tokenizer(folder: Path, tokenizer: Tokenizer, max_positions: int) -> None:
    """tokenizer.json and the tokenizer_config.json from which `AutoTokenizer` knows tokens and chat template."""
    tokenizer.save(folder / "tokenizer.json")
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_positions,
        "clean_up_tokenization_spaces": False,
    }
    for role in ("bos", "eos", "pad"):
        if (found := getattr(tokenizer, f"{role}_id")) is not None:
            config[f"{role}_token"] = tokenizer.decode([found], skip_special_tokens=False)
    if template := chat_template(tokenizer):
        config["chat_template"] = template
    _write(folder / "tokenizer_config.json", config)


def chat_template(tokenizer: Tokenizer) -> str | None:
    """The tokenizer's chat layout as Jinja; None where no token can end a turn."""
    try:
        return CHAT_TEMPLATES[layout_name(tokenizer)]
    except DataError:
        return None


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
