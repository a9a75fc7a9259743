"""One way to get a model for use: from a run directory, a checkpoint or a Hugging Face folder.

All three are untrusted: sizes and checksums are checked before a tensor is made, nothing is unpickled, and what is
damaged is named.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from data_pipeline.tokenizer import Tokenizer
from modeling.config import ModelConfig
from modeling.decoder import Decoder
from modeling.hf_convert import load_hf
from quant.apply import freeze, prepare
from quant.spec import QuantSpec
from stages import exact
from stages.checkpoint import load_full, read_document, resolve, verify
from stages.errors import CheckpointError, InputError
from stages.lineage import Lineage
from stages.scoring import Scorer, decoder_nll
from stages.state import read_model


@dataclass(frozen=True, kw_only=True)
class LoadedModel(Scorer):
    """A whole model in eval mode, with what belongs to it; `stages.evaluate` scores it as it is."""

    model: Decoder
    kind: Literal["checkpoint", "hf"]
    path: Path
    lineage: Lineage | None
    """None for a Hugging Face folder."""
    quant: QuantSpec | None
    """How the model is prepared: its forward pass computes with rounded weights and activations."""


def load_model(path: str | Path, device: str | torch.device = "cpu", *, latent: bool = False) -> LoadedModel:
    """Load in fp32 for use on one device.

    Args:
        path: a run or stage directory (its last checkpoint is taken), a checkpoint, or a Hugging Face folder with
            config.json, weights and tokenizer.json.
        latent: keep the full-precision weights behind the rounded ones of a QAT checkpoint, which
            `quant.apply.convert` needs; else they are put on their grid once, which makes every forward pass cheaper, and
            on a CPU the model computes as the runtime does (`stages.exact`), so that it says what its packed file says.

    Raises:
        InputError: nothing there, or of no known form. CheckpointError, ConversionError, DataError: damaged.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"model {path}: no such file or folder; give a run, a checkpoint or a Hugging Face folder")
    if not path.is_dir():
        raise InputError(f"model {path}: a file; expected a run, a checkpoint or a Hugging Face folder")
    if (path / "config.json").is_file():
        return _load_hf(path, device)
    loaded = _load_checkpoint(resolve(path), device)
    if loaded.quant is not None and not latent:
        if torch.device(device).type == "cpu" and exact.suits(loaded.model.config, loaded.quant):
            exact.use_runtime_arithmetic(loaded.model)
        freeze(loaded.model)
    return loaded


def _load_hf(folder: Path, device: str | torch.device) -> LoadedModel:
    if not (folder / "tokenizer.json").is_file():
        raise InputError(f"model {folder}: no tokenizer.json beside config.json; save the model's fast tokenizer there")
    config, state = load_hf(folder)
    return _loaded(config, None, state, Tokenizer.from_file(folder), device, kind="hf", path=folder, lineage=None)


def _load_checkpoint(folder: Path, device: str | torch.device) -> LoadedModel:
    verify(folder)
    config, quant = read_model(folder)
    state = load_full(folder, "model.")
    tokenizer = Tokenizer.from_file(folder / "tokenizer.json")
    lineage = Lineage.from_dict(read_document(folder, "lineage"))
    return _loaded(config, quant, state, tokenizer, device, kind="checkpoint", path=folder, lineage=lineage)


def _loaded(
    config: ModelConfig, quant: QuantSpec | None, state: dict[str, Tensor], tokenizer: Tokenizer,
    device: str | torch.device, *, kind: Literal["checkpoint", "hf"], path: Path, lineage: Lineage | None,
) -> LoadedModel:  # fmt: skip
    if tokenizer.vocab_size > config.vocab_size:
        raise InputError(
            f"model {path}: its tokenizer has {tokenizer.vocab_size} tokens, its embedding {config.vocab_size}; they "
            "are not of one model, put back the right tokenizer.json"
        )
    model = build(config, quant, state, path).to(device)
    return LoadedModel(
        token_nll=decoder_nll(model), tokenizer=tokenizer, context=config.max_positions, model=model, kind=kind,
        path=path, lineage=lineage, quant=quant,
    )  # fmt: skip


def build(config: ModelConfig, quant: QuantSpec | None, state: dict[str, Tensor], path: Path) -> Decoder:
    """A decoder in eval mode that holds `state`, without a second copy of it."""
    with torch.device("meta"):
        model = Decoder(config)
    if quant is not None:
        prepare(model, quant)
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items()}
    for name in sorted(wanted.keys() ^ state.keys()):
        found, expected = ("no", "one") if name in wanted else ("a", "none")
        raise CheckpointError(f"{path}: has {found} weight {name}, expected {expected}; it is of another model")
    for name, shape in wanted.items():
        if state[name].shape != shape:
            raise CheckpointError(f"{path}: {name} is {list(state[name].shape)}, its model says {list(shape)}")
    model.load_state_dict({name: tensor.float() for name, tensor in state.items()}, assign=True)
    return model.requires_grad_(False).eval()
