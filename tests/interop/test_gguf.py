"""GGUF files: our integers bit for bit, our token ids, and llama.cpp's logits near ours.

llama.cpp rounds activations to INT8 in blocks of 32, we round whole tokens, so logits cannot be equal. Both are measured
against the same model without rounding of activations: there llama.cpp is nearer than we are (finer blocks), which a
wrong permutation, norm or mask would never let it be. Bounds stand at about twice what was measured (docs/interchange.md).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_pipeline.tokenizer import Tokenizer
from modeling.config import ModelConfig
from modeling.decoder import Decoder
from quant.apply import convert, prepare
from quant.spec import QuantSpec
from stages.errors import InputError
from stages.export_gguf import architecture, export_gguf, write_gguf_model
from stages.gguf_blocks import unpack
from stages.loading import load_model
from tests.helpers.interop_models import BASE, CONFIGS, TEXT, build, perplexity, tokenizer
from tests.stages.test_loading import write_checkpoint

gguf = pytest.importorskip("gguf", reason="gguf is not installed; make interop")
ARCHITECTURES = {"qk_norm": "qwen3", "skip": "deci", "window": "granite_swa"}
NAMES = {"q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output", "gate": "ffn_gate", "up": "ffn_up",
         "down": "ffn_down"}  # fmt: skip


@pytest.fixture(scope="module")
def tok() -> Tokenizer:
    return tokenizer()


def write(folder: Path, config: ModelConfig, tok: Tokenizer | None, spec: QuantSpec | None = None) -> tuple[Decoder, Path]:
    spec = spec or QuantSpec()
    model, path = build(config, spec), folder / "model.gguf"
    write_gguf_model(model, path, quant=spec, tokenizer=tok, lineage={"stage": "qat", "tokens_seen": 7, "parent": None})
    return model, path


def read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Keys and tensors of a file."""
    reader = gguf.GGUFReader(path)
    return {k: f.contents() for k, f in reader.fields.items()}, {t.name: t for t in reader.tensors}


def llama(path: Path, **options: Any) -> Any:
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed; make interop")
    return llama_cpp.Llama(str(path), n_ctx=256, n_batch=256, n_threads=1, logits_all=True, verbose=False, **options)


def logits(model: Any, ids: list[int]) -> torch.Tensor:
    """[T, V] of a llama.cpp model."""
    model.reset()
    model.eval(ids)
    return torch.from_numpy(model.scores[: len(ids)].copy())


@contextmanager
def exact_activations(model: Decoder) -> Iterator[None]:
    before = {module: module.quant for module in model.modules() if hasattr(module, "quant")}
    for module, spec in before.items():
        module.quant = replace(spec, activation_bits=16)
    yield
    for module, spec in before.items():
        module.quant = spec


def permuted(values: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Row 2 i of a head is ours i, row 2 i + 1 is ours i + head_dim / 2: written out, not as the export does it."""
    order = [head + half * head_dim // 2 + i for head in range(0, len(values), head_dim)
             for i in range(head_dim // 2) for half in (0, 1)]  # fmt: skip
    return values[order]


@pytest.mark.parametrize("spec", [QuantSpec(), QuantSpec(group_size=64), QuantSpec(weight_bits=8), QuantSpec(embedding=False)],
                         ids=["int4", "groups_of_64", "int8", "plain_embedding"])  # fmt: skip
@pytest.mark.parametrize("name", CONFIGS)
def test_codes_and_scales_are_those_of_training(tmp_path: Path, name: str, spec: QuantSpec) -> None:
    config = CONFIGS[name]
    model, path = write(tmp_path, config, None, spec)
    keys, tensors = read(path)
    expected = {}
    for weight, (codes, scales) in convert(model).items():
        scales = scales.repeat_interleave(spec.group_size // 32, dim=1)
        parts = weight.split(".")
        if parts[0] != "blocks":
            expected["token_embd.weight" if parts[0] == "embed" else "output.weight"] = (codes, scales)
            continue
        if parts[3] in "qk" and name != "qk_norm":
            codes, scales = permuted(codes, config.head_dim), permuted(scales, config.head_dim)
        for turn in range(config.block_repeat):
            place = int(parts[1]) * config.block_repeat + turn
            expected[f"blk.{place}.{NAMES[parts[3]]}.weight"] = (codes, scales)
    for target, (codes, scales) in expected.items():
        found_codes, found_scales = unpack(tensors[target].data, spec.weight_bits)
        assert np.array_equal(found_codes, codes.numpy()) and np.array_equal(found_scales, scales.numpy()), target
    matrices = {name for name, tensor in tensors.items() if tensor.tensor_type.name in ("Q4_0", "Q8_0")}
    assert matrices - {"token_embd.weight"} == expected.keys() - {"token_embd.weight"}
    assert keys["general.architecture"] == ARCHITECTURES.get(name, "llama")
    assert (keys["general.lineage.stage"], keys["general.lineage.tokens_seen"]) == ("qat", 7)
    assert keys["general.quantization.trained"] is True and "general.lineage.parent" not in keys


def test_the_packages_own_reader_sees_our_values(tmp_path: Path) -> None:
    """`gguf.dequantize` is another implementation of the encodings than ours."""
    model, path = write(tmp_path, BASE, None)
    codes, scales = convert(model)["blocks.1.feed_forward.down.weight"]
    tensor = read(path)[1]["blk.1.ffn_down.weight"]
    grid = codes.float().unflatten(-1, (-1, 32)) * scales.float().unsqueeze(-1)
    assert np.array_equal(gguf.dequantize(tensor.data, tensor.tensor_type), grid.flatten(-2).numpy())


@pytest.mark.parametrize("name", CONFIGS)
def test_llama_cpp_computes_what_we_do(tmp_path: Path, tok: Tokenizer, name: str) -> None:
    model, path = write(tmp_path, CONFIGS[name], tok)
    theirs = llama(path)
    ids = [tok.bos_id, *tok.encode(TEXT)]
    found = logits(theirs, ids)
    with torch.no_grad():
        ours = model(torch.tensor([ids]))[0]
        with exact_activations(model):
            exact = model(torch.tensor([ids]))[0]

    def distance(a: torch.Tensor, b: torch.Tensor) -> float:
        return float((a - b).norm() / b.norm())

    assert distance(found, exact) < min(distance(ours, exact), 0.08)
    assert distance(found, ours) < 0.15
    assert abs(perplexity(found, ids) / perplexity(ours, ids) - 1) < 0.06
    # Where our two best logits lie further apart than the two runtimes' rounding, the next token is the same.
    best = ours.topk(2).values
    clear = (best[:, 0] - best[:, 1]) > 4 * (found - ours).pow(2).mean(-1).sqrt()
    assert clear.sum() > 10 and torch.equal(found.argmax(-1)[clear], ours.argmax(-1)[clear])


def test_greedy_tokens_are_the_same_while_the_choice_is_clear(tmp_path: Path, tok: Tokenizer) -> None:
    model, path = write(tmp_path, replace(BASE, init_std=0.3), tok)
    theirs, ids = llama(path), [tok.bos_id, *tok.encode("The model reads")]
    compared = 0
    for _ in range(12):
        with torch.no_grad():
            ours = model(torch.tensor([ids]))[0, -1]
        found = logits(theirs, ids)[-1]
        best = ours.topk(2).values
        if best[0] - best[1] > 4 * (found - ours).pow(2).mean().sqrt():
            compared += 1
            assert found.argmax() == ours.argmax()
        ids.append(int(ours.argmax()))
    assert compared >= 3


@pytest.mark.parametrize("merges_whole_words", [False, True])
def test_llama_cpp_tokenizes_as_we_do(tmp_path: Path, tok: Tokenizer, merges_whole_words: bool) -> None:
    content = json.loads(tok.to_json())
    content["model"]["ignore_merges"] = merges_whole_words
    ours = Tokenizer.from_json(json.dumps(content))
    _, path = write(tmp_path, BASE, ours)
    keys = read(path)[0]
    assert keys["tokenizer.ggml.pre"] == ("llama-bpe" if merges_whole_words else "dbrx")
    theirs = llama(path)
    texts = [TEXT, "", " ", "a  b\n\n c \t\n", "x" * 50, "I'M we'Ll 1234567", "<|eot_id|> in text",
             "e\u0301\u200d👩‍🚀", "\r\n\r\n  end  "]
    for text in texts:
        assert theirs.tokenize(text.encode(), add_bos=True, special=False) == [ours.bos_id, *ours.encode(text)], text
    assert theirs.tokenize(b"<|eot_id|>", add_bos=False, special=True) == [ours.eot_id]
    assert (theirs.token_bos(), theirs.token_eos()) == (ours.bos_id, ours.eos_id)
    assert "start_header_id" in keys["tokenizer.chat_template"]


def test_a_checkpoint_is_exported_and_one_without_qat_is_rounded(tmp_path: Path, tok: Tokenizer) -> None:
    plain = Decoder(BASE)
    torch.nn.init.normal_(plain.embed.weight, std=0.1)
    export_gguf(write_checkpoint(tmp_path / "run", plain, tok), tmp_path / "new" / "m.gguf")
    keys, tensors = read(tmp_path / "new" / "m.gguf")
    assert keys["general.quantization.trained"] is False and keys["general.lineage.stage"] == "sft"
    prepare(plain, QuantSpec())
    codes, _ = convert(plain)["embed.weight"]
    assert np.array_equal(unpack(tensors["token_embd.weight"].data, 4)[0], codes.numpy())
    assert load_model(tmp_path / "run" / "step-000003").quant is None


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"qk_norm": True, "attention": ("full", "window", "full")}, "QK-norm and window"),
        ({"attention": ("skip", "full", "full")}, "first block"),
        ({"attention": ("full", "window", "skip")}, "windows"),
        ({"num_layers": 300, "block_repeat": 2}, "512"),
    ],
)
def test_what_llama_cpp_has_no_graph_for_is_refused(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        architecture(replace(BASE, **fields))


def test_other_refusals_leave_nothing_behind(tmp_path: Path, tok: Tokenizer) -> None:
    target = tmp_path / "m.gguf"
    with pytest.raises(InputError, match="groups of 16"):
        write_gguf_model(build(BASE), target, quant=QuantSpec(group_size=16))
    content = json.loads(tok.to_json())
    content["normalizer"] = {"type": "NFC"}
    with pytest.raises(InputError, match="normalises"):
        write_gguf_model(build(BASE), target, quant=QuantSpec(), tokenizer=Tokenizer.from_json(json.dumps(content)))
    assert not list(tmp_path.iterdir())
    target.write_text("mine")
    with pytest.raises(InputError, match="nothing is overwritten"):
        write_gguf_model(build(BASE), target, quant=QuantSpec())
    assert target.read_text() == "mine"
