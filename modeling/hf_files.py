"""Folders of Hugging Face on disk: config.json and weights, read as untrusted, written whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modeling.hf_layouts import ConversionError


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConversionError(f"{path}: cannot be read ({error}); expected a Hugging Face model folder") from None
    if not isinstance(value, dict):
        raise ConversionError(f"{path}: holds no object; expected a Hugging Face config")
    return value


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder with .safetensors (one file or an index of several) or .bin (without pickle's code)."""
    tensors: dict[str, Tensor] = {}
    for file in _weight_files(folder):
        tensors.update(_read_file(file))
    return tensors


def _weight_files(folder: Path) -> list[Path]:
    for single, index in (("model.safetensors", "model.safetensors.index.json"),
                          ("pytorch_model.bin", "pytorch_model.bin.index.json")):
        if (folder / single).is_file():
            return [folder / single]
        if (folder / index).is_file():
            names = sorted(set(read_json(folder / index).get("weight_map", {}).values()))
            # The index is untrusted: it may name files of this folder only.
            if wrong := [name for name in names if Path(name).name != name or not (folder / name).is_file()]:
                raise ConversionError(f"{folder / index}: names {wrong[0]!r}, which is not a file of {folder}")
            return [folder / name for name in names]
    raise ConversionError(f"{folder}: no model.safetensors and no pytorch_model.bin; expected a Hugging Face model folder")


def _read_file(file: Path) -> dict[str, Tensor]:
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(file)
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ConversionError(f"{file}: damaged or not a weight file ({str(error).splitlines()[0]})") from error


def write_folder(
    folder: Path, hf_config: dict[str, Any], tensors: Mapping[str, Tensor],
    extra: Callable[[Path, dict[str, Any]], None] | None = None,
) -> None:  # fmt: skip
    """config.json and model.safetensors. `extra(folder, config)` may add files, or keys to the config, before the folder
    appears under its name."""
    from safetensors.torch import save_file

    beside = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    beside.mkdir(parents=True)
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, beside / "model.safetensors",
                  metadata={"format": "pt"})
        if extra is not None:
            extra(beside, hf_config)
        (beside / "config.json").write_text(json.dumps(hf_config, indent=2) + "\n", encoding="utf-8")
        beside.rename(folder)
    finally:
        if beside.exists():
            shutil.rmtree(beside)
