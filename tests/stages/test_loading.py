"""Loading of checkpoints and Hugging Face folders, whole or damaged."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from data_pipeline.tokenizer import Tokenizer
from modeling.config import ModelConfig
from modeling.decoder import Decoder
from modeling.hf_convert import save_hf
from modeling.init import init_weights
from quant.apply import convert, prepare
from quant.spec import QuantSpec
from stages.checkpoint import CheckpointWriter
from stages.config import CheckpointConfig
from stages.errors import InputError
from stages.evaluate import perplexity
from stages.lineage import Lineage
from stages.loading import load_model

IDS = torch.arange(12).view(2, 6)
TEXT = "The cat sat on the mat."
SPEC = QuantSpec(group_size=16)
LINEAGE = Lineage(parent=None, recipe_hash="r", data_fingerprint="d", tokens_seen=7, stage="sft", step=3)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([TEXT] * 20, 300)


@pytest.fixture(scope="module")
def model() -> Decoder:
    config = ModelConfig(vocab_size=300, hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=1, ffn_size=48,
                         head_dim=16, init_std=0.3)  # fmt: skip
    model = Decoder(config).eval()
    init_weights(model, 0)
    return model


def write_checkpoint(root: Path, model: Decoder, tokenizer: Tokenizer, quant: QuantSpec | None = None) -> Path:
    writer = CheckpointWriter(root, CheckpointConfig(asynchronous=False))
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    tensors["optim.norm.weight.step"] = torch.tensor(3.0)
    documents = {
        "model": {**asdict(model.config), "quant": None if quant is None else asdict(quant)},
        "lineage": LINEAGE.to_dict(), "tokenizer.json": tokenizer.to_json().encode(),
    }  # fmt: skip
    writer.save(3, tensors, documents)
    writer.wait()
    return root / "step-000003"


@pytest.fixture
def run(tmp_path: Path, model: Decoder, tokenizer: Tokenizer) -> Path:
    write_checkpoint(tmp_path / "run" / "sft" / "checkpoints", model, tokenizer)
    return tmp_path / "run"


@pytest.mark.parametrize("part", ["", "sft", "sft/checkpoints/step-000003"])
def test_a_run_a_stage_and_a_checkpoint_load_alike(run: Path, part: str, model: Decoder, tokenizer: Tokenizer) -> None:
    loaded = load_model(run / part)
    assert (loaded.kind, loaded.quant, loaded.lineage) == ("checkpoint", None, LINEAGE)
    assert loaded.tokenizer.fingerprint == tokenizer.fingerprint
    assert not loaded.model.training and loaded.context == model.config.max_positions
    assert torch.equal(loaded.model(IDS), model(IDS))
    assert perplexity(loaded, [TEXT])["bits_per_byte"] > 0


def test_a_qat_checkpoint_computes_as_in_training_and_converts_to_the_same_integers(
    tmp_path: Path, model: Decoder, tokenizer: Tokenizer
) -> None:
    prepared = Decoder(model.config).eval()
    prepared.load_state_dict(model.state_dict())
    prepare(prepared, SPEC)
    path = write_checkpoint(tmp_path, prepared, tokenizer, SPEC)
    loaded = load_model(path)
    assert loaded.quant == SPEC
    assert torch.equal(loaded.model(IDS), prepared(IDS))
    assert not torch.equal(loaded.model(IDS), model(IDS))
    integers = convert(load_model(path, latent=True).model)
    for name, (codes, scales) in convert(prepared).items():
        assert torch.equal(integers[name][0], codes) and torch.equal(integers[name][1], scales)


def test_a_hugging_face_folder_loads_with_its_tokenizer(tmp_path: Path, model: Decoder, tokenizer: Tokenizer) -> None:
    save_hf(tmp_path / "hf", model.config, model.state_dict())
    with pytest.raises(InputError, match=r"no tokenizer\.json"):
        load_model(tmp_path / "hf")
    tokenizer.save(tmp_path / "hf" / "tokenizer.json")
    loaded = load_model(tmp_path / "hf")
    assert (loaded.kind, loaded.lineage) == ("hf", None)
    torch.testing.assert_close(loaded.model(IDS), model(IDS), rtol=0, atol=1e-6)


def test_half_precision_weights_are_used_in_fp32(tmp_path: Path, model: Decoder, tokenizer: Tokenizer) -> None:
    save_hf(tmp_path / "hf", model.config, {name: t.bfloat16() for name, t in model.state_dict().items()})
    tokenizer.save(tmp_path / "hf" / "tokenizer.json")
    assert {parameter.dtype for parameter in load_model(tmp_path / "hf").model.parameters()} == {torch.float32}


def test_nothing_there_or_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file or folder"):
        load_model(tmp_path / "nowhere")
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="a file; expected"):
        load_model(tmp_path / "file")
    with pytest.raises(InputError, match="no committed checkpoint"):
        load_model(tmp_path)


def test_a_damaged_shard_is_named_and_never_loaded(run: Path) -> None:
    shard = next((run / "sft/checkpoints/step-000003").glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-5] ^= 1
    shard.write_bytes(content)
    with pytest.raises(InputError, match=shard.name):
        load_model(run)


def test_a_tokenizer_larger_than_the_embedding_is_refused(tmp_path: Path, model: Decoder) -> None:
    path = write_checkpoint(tmp_path, model, Tokenizer.train([TEXT] * 20, 310))
    with pytest.raises(InputError, match="310 tokens, its embedding 300"):
        load_model(path)


def test_weights_of_another_model_are_refused(tmp_path: Path, model: Decoder, tokenizer: Tokenizer) -> None:
    folder = write_checkpoint(tmp_path, model, tokenizer)

    def edited(**fields: object) -> Path:
        copy = tmp_path / f"copy{len(list(tmp_path.iterdir()))}"
        shutil.copytree(folder, copy)
        commit = json.loads((copy / "commit.json").read_text())
        document = json.dumps(json.loads((copy / "model.json").read_text()) | fields).encode()
        (copy / "model.json").write_bytes(document)
        import hashlib

        commit["files"]["model.json"] |= {"bytes": len(document), "sha256": hashlib.sha256(document).hexdigest()}
        (copy / "commit.json").write_text(json.dumps(commit))
        return copy

    with pytest.raises(InputError, match=r"has no weight blocks\.2"):
        load_model(edited(num_layers=3))
    with pytest.raises(InputError, match=r"has a weight blocks\.1"):
        load_model(edited(num_layers=1))
    with pytest.raises(InputError, match=r"feed_forward.*\[48, 32\], its model says \[64, 32\]"):
        load_model(edited(ffn_size=64))
