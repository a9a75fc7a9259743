"""Weights and configs to and from Hugging Face, in the layouts of `modeling.hf_layouts`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modeling import hf_int4, hf_stock_moe
from modeling.config import ModelConfig
from modeling.hf_config import config_from_hf, hf_config
from modeling.hf_files import read_json, read_weights, write_folder
from modeling.hf_layouts import (
    LAYOUTS,
    MOBILEMOE,
    NEIGHBOURS,
    STOCK_MOE,
    ConversionError,
    Layout,
    default_layout,
    from_hf_name,
    interleave_heads,
    rotated,
    split_halves,
    to_hf_name,
)
from modeling.hf_mobilemoe import add_remote_code

__all__ = [
    "LAYOUTS", "ConversionError", "Integers", "Layout", "config_from_hf", "default_layout", "from_hf", "interleave_heads",
    "load_hf", "read_json", "save_hf", "to_hf",
]  # fmt: skip

Integers = Mapping[str, tuple[Tensor, Tensor]]
"""int8 codes and fp16 scales of weights, by our names."""


def to_hf(
    config: ModelConfig, state_dict: Mapping[str, Tensor], layout: Layout | None = None, integers: Integers | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(config.json, state dict) of a model; `integers` go with the layout mobilemoe-int4, which holds nothing else.

    Raises ConversionError where the layout cannot hold the model.
    """
    layout = layout or default_layout(config)
    their_config = hf_config(config, layout)
    if (layout == "mobilemoe-int4") != (integers is not None):
        raise ConversionError(f"the {layout} layout {'needs' if integers is None else 'has no'} codes and scales; "
                              "they are what mobilemoe-int4 holds")

    def place(name: str, tensor: Tensor) -> Tensor:
        return interleave_heads(tensor, config.head_dim) if layout in NEIGHBOURS and rotated(name) else tensor

    tensors = {to_hf_name(name, layout): place(name, tensor) for name, tensor in state_dict.items()}
    if integers is not None:
        tensors = hf_int4.encode_state(tensors, {
            to_hf_name(name, layout): (place(name, codes), place(name, scales)) for name, (codes, scales) in integers.items()
        })  # fmt: skip
    if layout in STOCK_MOE:
        tensors = hf_stock_moe.encode_state(config, tensors, layout)
    return their_config, tensors


def from_hf(hf: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Our config and state dict. Raises ConversionError for what our decoder does not have, or missing weights."""
    config, layout = config_from_hf(hf)
    if layout == "mobilemoe-int4":
        state_dict = hf_int4.decode_state(state_dict)
    if layout in STOCK_MOE:
        state_dict = hf_stock_moe.decode_state(config, state_dict, layout)
    tensors: dict[str, Tensor] = {}
    for hf_name, tensor in state_dict.items():
        if hf_name == "lm_head.weight" and config.tie_embeddings:
            continue  # the same table again
        tensors[from_hf_name(hf_name, layout)] = tensor
    _check_complete(config, tensors, layout)
    for name, tensor in tensors.items():
        if layout in NEIGHBOURS and rotated(name):
            tensors[name] = split_halves(tensor, config.head_dim)
    return config, tensors


def save_hf(
    folder: str | Path, config: ModelConfig, state_dict: Mapping[str, Tensor], *, layout: Layout | None = None,
    integers: Integers | None = None, extra: Callable[[Path, dict[str, Any]], None] | None = None,
) -> None:  # fmt: skip
    """Write config.json and model.safetensors, whole or not at all; beside MobileMoE's, the code that runs it.

    `extra(folder, config)` may add files, or keys to the config, before the folder appears under its name.
    """
    hf, tensors = to_hf(config, state_dict, layout, integers)

    def add_rest(beside: Path, hf: dict[str, Any]) -> None:
        if (layout or default_layout(config)) in MOBILEMOE:
            add_remote_code(beside)
        if extra is not None:
            extra(beside, hf)

    write_folder(Path(folder), hf, tensors, add_rest)


def load_hf(folder: str | Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Read a local folder. Code that lies in it is not run."""
    folder = Path(folder)
    return from_hf(read_json(folder / "config.json"), read_weights(folder))


def _check_complete(config: ModelConfig, tensors: Mapping[str, Tensor], layout: Layout) -> None:
    from modeling.decoder import Decoder

    if config.num_layers > len(tensors):  # before that many are built: it is only what the file says
        raise ConversionError(f"config.json says {config.num_layers} layers, and the weights are {len(tensors)} tensors")
    try:
        with torch.device("meta"):
            wanted = {name: tuple(tensor.shape) for name, tensor in Decoder(config).state_dict().items()}
    except RuntimeError as error:
        raise ConversionError(f"config.json asks for a tensor too large to have ({error})") from None
    if missing := sorted(set(wanted) - set(tensors)):
        raise ConversionError(f"the weights lack {to_hf_name(missing[0], layout)} and {len(missing) - 1} more; "
                              f"expected {len(wanted)} tensors")
    for name, shape in wanted.items():
        if tuple(tensors[name].shape) != shape:
            raise ConversionError(f"{to_hf_name(name, layout)} is {tuple(tensors[name].shape)}, the config says {shape}")
    if extra := sorted(set(tensors) - set(wanted)):
        raise ConversionError(f"the weights hold {to_hf_name(extra[0], layout)}, which the config has no place for")
