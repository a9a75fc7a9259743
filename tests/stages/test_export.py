"""What we export, `transformers` loads: same logits, same tokens, same chats."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from test_loading import IDS, SPEC, TEXT, write_checkpoint

from data_pipeline.chat import render, render_prompt
from data_pipeline.tokenizer import Tokenizer
from modeling.config import ModelConfig
from modeling.decoder import Decoder
from modeling.hf_convert import ConversionError
from modeling.init import init_weights
from quant.apply import bake, prepare
from quant.primitives import group_scales
from quant.spec import QuantSpec
from stages.errors import InputError
from stages.export import CHAT_TEMPLATES, chat_template, export_hf, write_tokenizer
from stages.loading import load_model

CHATS = [
    [{"role": "user", "content": " the cat? "}, {"role": "assistant", "content": "sat"}],
    [{"role": "system", "content": "mat"}, {"role": "user", "content": "on"}, {"role": "tool_call", "content": "{}"},
     {"role": "tool", "content": "7"}, {"role": "assistant", "content": "the\nmat"}],
]  # fmt: skip


def build(**fields: object) -> Decoder:
    config = dict(vocab_size=300, hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=1, ffn_size=48, head_dim=16,
                  init_std=0.3, max_positions=64)  # fmt: skip
    model = Decoder(ModelConfig(**{**config, **fields})).eval()  # type: ignore[arg-type]
    init_weights(model, 0)
    return model


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([TEXT] * 20, 300)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("export")
    export_hf(write_checkpoint(folder, build(), tokenizer), folder / "a" / "hf")
    return folder / "a" / "hf"


@pytest.mark.parametrize("fields", [{}, {"tie_embeddings": False}, {"qk_norm": True}], ids=str)
def test_transformers_gives_our_logits(tmp_path: Path, tokenizer: Tokenizer, fields: dict[str, object]) -> None:
    transformers = pytest.importorskip("transformers")
    model = build(**fields)
    export_hf(write_checkpoint(tmp_path, model, tokenizer), tmp_path / "hf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(theirs(IDS).logits, model(IDS), rtol=0, atol=1e-4)


def test_a_qat_checkpoint_is_exported_on_its_grid(tmp_path: Path, tokenizer: Tokenizer) -> None:
    transformers = pytest.importorskip("transformers")
    weights_only = QuantSpec(group_size=16, activation_bits=16)
    model = build()
    prepare(model, weights_only)
    export_hf(write_checkpoint(tmp_path, model, tokenizer, weights_only), tmp_path / "hf")
    plain = load_model(tmp_path / "hf").model
    for name, expected in bake(model).items():
        assert torch.equal(plain.state_dict()[name], expected)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(theirs(IDS).logits, model(IDS), rtol=0, atol=1e-4)
    codes = plain.blocks[0].feed_forward.up.weight.view(48, 2, 16) / group_scales(
        model.blocks[0].feed_forward.up.weight, SPEC
    ).float().unsqueeze(-1)
    torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-5)
    assert json.loads((tmp_path / "hf" / "lineage.json").read_text())["quant"]["weight_bits"] == 4


def test_auto_tokenizer_encodes_and_renders_chats_as_we_do(exported: Path, tokenizer: Tokenizer) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(exported)
    assert theirs(TEXT)["input_ids"] == [tokenizer.bos_id, *tokenizer.encode(TEXT)]
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (
        tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id,
    )  # fmt: skip
    assert theirs.model_max_length == 64
    for chat in CHATS:
        assert theirs.apply_chat_template(chat, return_dict=False) == render(tokenizer, chat)[0]
        asked = theirs.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        assert asked == render_prompt(tokenizer, chat)


@pytest.mark.parametrize("name", ["chatml", "plain"])
def test_other_chat_layouts_are_rendered_as_we_do(name: str) -> None:
    import tokenizers
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from tokenizers import decoders, models, pre_tokenizers, trainers

    special = {"chatml": ["<s>", "</s>", "<|im_start|>", "<|im_end|>"], "plain": ["<s>", "</s>"]}[name]
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator([TEXT], trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False,
    ))  # fmt: skip
    tokenizer = Tokenizer(backend)
    assert chat_template(tokenizer) == CHAT_TEMPLATES[name]
    template = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(CHAT_TEMPLATES[name])
    for chat in CHATS:
        said = template.render(messages=chat, bos_token="<s>", eos_token="</s>", add_generation_prompt=True)
        assert said == tokenizer.decode(render_prompt(tokenizer, chat), skip_special_tokens=False)


def test_a_tokenizer_that_cannot_end_a_turn_has_no_chat_template(tmp_path: Path) -> None:
    import tokenizers

    tokenizer = Tokenizer(tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "b": 1}, [])))
    write_tokenizer(tmp_path, tokenizer, 64)
    assert "chat_template" not in json.loads((tmp_path / "tokenizer_config.json").read_text())


def test_generation_stops_at_the_end_of_a_turn_too(exported: Path, tokenizer: Tokenizer) -> None:
    config = json.loads((exported / "generation_config.json").read_text())
    assert config["eos_token_id"] == [tokenizer.eos_id, tokenizer.eot_id]
    assert json.loads((exported / "config.json").read_text())["bos_token_id"] == tokenizer.bos_id
    assert json.loads((exported / "lineage.json").read_text())["stage"] == "sft"


def test_an_export_never_overwrites_and_leaves_nothing_half_written(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "taken").mkdir()
    checkpoint = write_checkpoint(tmp_path / "c", build(attention=("full", "window")), tokenizer)
    with pytest.raises(InputError, match="nothing is overwritten"):
        export_hf(checkpoint, tmp_path / "taken")
    with pytest.raises(ConversionError, match="window"):
        export_hf(checkpoint, tmp_path / "hf")
    assert {path.name for path in tmp_path.iterdir()} == {"taken", "c"}
