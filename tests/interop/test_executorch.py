"""ExecuTorch programs: our integers in the program, and XNNPACK's logits those of what it is said to compute.

What XNNPACK does otherwise than we do is known: INT8 activations with a zero point, and bf16 scales of weights. torchao in
Python with bf16 scales does the same, so the program must equal it; against ours the distance is bounded by twice what
was measured (docs/interchange.md). Lowering takes a minute a model, so two models stand for all.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipeline.tokenizer import Tokenizer
from modeling.decoder import Decoder
from quant.apply import convert
from quant.spec import QuantSpec
from stages.errors import InputError
from stages.export_executorch import prompt_module, write_executorch_model
from tests.helpers.interop_models import BASE, CONFIGS, TEXT, build, perplexity, tokenizer

MIXED = replace(BASE, num_layers=3, block_repeat=1, qk_norm=True, attention=("full", "skip", "window"), tie_embeddings=False)
SHARED = replace(BASE, num_layers=1, block_repeat=2)


@pytest.fixture(scope="module")
def tok() -> Tokenizer:
    return tokenizer()


@pytest.fixture(scope="module", params=["shared", "mixed"])
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tok: Tokenizer) -> Any:
    """A model, its loaded program."""
    runtime = pytest.importorskip("executorch.runtime", reason="executorch is not installed; make interop")
    model = build(SHARED if request.param == "shared" else MIXED)
    path = tmp_path_factory.mktemp("pte") / "new" / "model.pte"
    write_executorch_model(model, path, quant=QuantSpec(), tokenizer=tok, lineage={"stage": "qat"})
    assert [file.name for file in path.parent.iterdir()] == ["model.pte"]
    return model, runtime.Runtime.get().load_program(path)


def with_bf16_scales(module: torch.nn.Module) -> torch.nn.Module:
    for part in module.modules():
        if hasattr(weight := getattr(part, "weight", None), "qdata"):
            weight.scale.copy_(weight.scale.bfloat16().float())
    return module


@pytest.mark.timeout(600)
@pytest.mark.slow
def test_the_program_computes_what_we_do_but_for_zero_points_and_bf16_scales(program: Any, tok: Tokenizer) -> None:
    model, loaded = program
    method = loaded.load_method("forward")
    ids = [tok.bos_id, *tok.encode(TEXT)]
    same = with_bf16_scales(prompt_module(model))
    for length in (2, 7, len(ids)):
        tokens = torch.tensor([ids[:length]])
        with torch.no_grad():
            found, expected, ours = method.execute([tokens])[0], same(tokens), model(tokens)
        assert found.shape == ours.shape
        # Short prompts came out equal to 1e-4; in longer ones single codes fall on the other side of a half.
        assert float((found - expected).norm() / expected.norm()) < (0.01 if length < 10 else 0.05)
    assert float((found - ours).norm() / ours.norm()) < 0.16
    assert abs(perplexity(found[0], ids) / perplexity(ours[0], ids) - 1) < 0.06
    best = ours[0].topk(2).values
    clear = (best[:, 0] - best[:, 1]) > 4 * (found - ours)[0].pow(2).mean(-1).sqrt()
    assert clear.sum() > 10 and torch.equal(found[0].argmax(-1)[clear], ours[0].argmax(-1)[clear])


@pytest.mark.timeout(600)
@pytest.mark.slow
def test_greedy_tokens_are_the_same_while_the_choice_is_clear(program: Any, tok: Tokenizer) -> None:
    model, loaded = program
    method, ids, compared = loaded.load_method("forward"), [tok.bos_id, *tok.encode("The model reads")], 0
    for _ in range(12):
        tokens = torch.tensor([ids])
        with torch.no_grad():
            found, ours = method.execute([tokens])[0][0, -1], model(tokens)[0, -1]
        best = ours.topk(2).values
        if best[0] - best[1] > 4 * (found - ours).pow(2).mean().sqrt():
            compared += 1
            assert found.argmax() == ours.argmax()
        ids.append(int(ours.argmax()))
    assert compared >= 1


@pytest.mark.timeout(600)
@pytest.mark.slow
def test_what_the_program_tells_of_itself(program: Any, tok: Tokenizer) -> None:
    model, loaded = program
    told = {name: loaded.load_method(name).execute([])[0] for name in loaded.method_names if name != "forward"}
    assert (told["get_vocab_size"], told["get_max_seq_len"], told["get_bos_id"]) == (512, 256, tok.bos_id)
    assert json.loads(told["get_lineage"]) == {"stage": "qat"} and json.loads(told["get_quantization"])["trained"]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("spec", [QuantSpec(), QuantSpec(group_size=64), QuantSpec(embedding=False)], ids=str)
def test_torchao_gets_the_codes_and_scales_of_training(name: str, spec: QuantSpec) -> None:
    pytest.importorskip("torchao", reason="torchao is not installed; make interop")
    model = build(CONFIGS[name], spec)
    module = prompt_module(model)
    expected = convert(model)
    for weight, (codes, scales) in expected.items():
        if weight == "embed.weight":
            assert torch.equal(module.embed.codes, codes) and torch.equal(module.embed.scales, scales.float())
            if model.head is not None:
                continue
        found = module.get_parameter("head.weight" if weight == "embed.weight" else weight)
        assert torch.equal(found.qdata, codes) and torch.equal(found.scale, scales.float()), weight
        assert not found.zero_point.any()
    with torch.no_grad():
        tokens = torch.arange(40)[None]
        ours, theirs = model(tokens), module(tokens)
    assert float((theirs - ours).norm() / ours.norm()) < 0.16 and math.isfinite(float(theirs.sum()))


def test_refusals_leave_nothing_behind(tmp_path: Path) -> None:
    target = tmp_path / "m.pte"
    for spec in (QuantSpec(weight_bits=8), QuantSpec(group_size=16)):
        with pytest.raises(InputError, match="XNNPACK has 4 bits"):
            write_executorch_model(Decoder(BASE), target, quant=spec)
    assert not list(tmp_path.iterdir())
    target.write_text("mine")
    with pytest.raises(InputError, match="nothing is overwritten"):
        write_executorch_model(Decoder(BASE), target)
    assert target.read_text() == "mine"
