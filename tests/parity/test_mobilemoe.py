"""`transformers` on our export of MobileMoE, with the code that lies beside it: same logits, same tokens."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from modeling.config import ModelConfig
from modeling.decoder import Decoder
from modeling.generate import generate
from modeling.hf_convert import load_hf, save_hf
from stages.export import int4_integers
from tests.helpers.moe_models import CONFIG, IDS, VARIANTS, build, in_transformers


def agree(ours: Decoder, theirs: torch.nn.Module) -> None:
    with torch.no_grad():
        torch.testing.assert_close(ours(IDS), theirs(IDS).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_the_exported_folder_gives_our_logits(config: ModelConfig, tmp_path: Path) -> None:
    model = build(config)
    save_hf(tmp_path / "hf", config, model.state_dict())
    agree(model, in_transformers(tmp_path / "hf"))


@pytest.mark.parametrize("tied", [True, False])
def test_the_int4_folder_gives_the_logits_of_its_import(tied: bool, tmp_path: Path) -> None:
    config = replace(CONFIG, tie_embeddings=tied)
    model = build(config)
    save_hf(tmp_path / "hf", config, model.state_dict(), layout="mobilemoe-int4", integers=int4_integers(model, None))
    _, state = load_hf(tmp_path / "hf")
    ours = Decoder(config).eval()
    ours.load_state_dict(state)
    theirs = in_transformers(tmp_path / "hf", dtype=torch.float32)
    agree(ours, theirs)
    assert not [name for name, _ in theirs.named_parameters() if "proj" in name or "embed" in name]
    half = in_transformers(tmp_path / "hf")  # as config.json says: bf16, routers fp32
    assert {p.dtype for name, p in half.named_parameters() if "router" in name} == {torch.float32}
    assert half(IDS).logits.dtype == torch.bfloat16


def test_it_generates_with_a_cache_without_one_and_in_padded_rows(tmp_path: Path) -> None:
    model = build()
    save_hf(tmp_path / "hf", CONFIG, model.state_dict())
    theirs = in_transformers(tmp_path / "hf")
    prompts = [IDS[0].tolist(), IDS[1, :9].tolist()]
    wanted = [list(generate(model, prompt, max_new_tokens=6)) for prompt in prompts]
    ids = torch.tensor([prompts[0], [0] * 14 + prompts[1]])
    mask = torch.tensor([[1] * 23, [0] * 14 + [1] * 9])
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    for use_cache in (True, False):
        got = theirs.generate(ids, use_cache=use_cache, **options)
        assert got[:, 23:].tolist() == wanted


def test_what_transformers_saves_again_is_still_the_model(tmp_path: Path) -> None:
    model = build()
    save_hf(tmp_path / "hf", CONFIG, model.state_dict())
    in_transformers(tmp_path / "hf").save_pretrained(tmp_path / "again")
    config, state = load_hf(tmp_path / "again")
    assert config == CONFIG
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


def test_it_trains(tmp_path: Path) -> None:
    save_hf(tmp_path / "hf", CONFIG, build().state_dict())
    theirs = in_transformers(tmp_path / "hf").train()
    loss = theirs(IDS, labels=IDS).loss
    loss.backward()
    assert loss.item() > 0 and all(parameter.grad is not None for parameter in theirs.parameters())
