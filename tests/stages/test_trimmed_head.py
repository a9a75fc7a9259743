"""A head that says only some tokens: the same logits there, minus infinity elsewhere, through training and scoring."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from data_pipeline.chat import end_of_turn_id
from data_pipeline.prepare import prepare_stage
from kernels.runtime import PackedModel
from modeling.config import ModelConfig
from modeling.decoder import Decoder
from modeling.generate import generate
from modeling.hf_convert import ConversionError
from modeling.prune import prune, uncovered
from quant.spec import QuantSpec
from stages.config import DistillConfig
from stages.export import export_hf
from stages.export_packed import export_packed, model_metadata, pack_model
from stages.importance_file import Calibration, calibrate_checkpoint
from stages.loading import LoadedModel, load_model
from stages.objectives import TeacherModel, TrainableModel, kl_divergence
from stages.output_tokens import frequent_outputs
from stages.packed import generate_packed, load_packed
from stages.prune import prune_checkpoint
from stages.scoring import Row, decoder_nll, decoder_nll_and_misses
from tests.helpers.prunable import BACKBONE, TOKENS, decoder, load, random_importance
from tests.helpers.stage_jobs import MODEL, change, chat_data, losses, pretrain_job, run_job

IDS = (3, 5, 8, 20, 21, 60)
TRIMMED = replace(BACKBONE, tie_embeddings=False, output_tokens=IDS)


def trimmed(parent: Decoder | None = None) -> Decoder:
    parent = parent or decoder()
    return load(TRIMMED, prune(parent.config, parent.state_dict(), random_importance(parent.config), TRIMMED))


def labels() -> torch.Tensor:
    """Half of them are tokens that the head has."""
    generator = torch.Generator().manual_seed(0)
    picked = torch.tensor(IDS)[torch.randint(0, len(IDS), TOKENS.shape, generator=generator)]
    return torch.where(torch.rand(TOKENS.shape, generator=generator) < 0.5, picked, -100)


@pytest.mark.parametrize("tied", [True, False])
def test_logits_are_the_parents_where_the_head_has_them(tied):
    parent = decoder(replace(BACKBONE, tie_embeddings=tied))
    found, expected = trimmed(parent)(TOKENS), parent(TOKENS)
    assert found.shape == expected.shape
    torch.testing.assert_close(found[..., list(IDS)], expected[..., list(IDS)], rtol=1e-5, atol=1e-5)
    assert torch.isinf(found[..., [i for i in range(61) if i not in IDS]]).all()


def test_sums_of_the_config_are_the_modules():
    assert TRIMMED.num_params() == sum(p.numel() for p in Decoder(TRIMMED).parameters())
    assert BACKBONE.flops_per_token() - TRIMMED.flops_per_token() == 2 * 48 * (61 - 6)
    with pytest.raises(ValueError, match="untie it"):
        replace(TRIMMED, tie_embeddings=True)
    for ids in ((5, 3), (3, 3), (-1, 3), (3, 61)):
        with pytest.raises(ValueError, match="ascending ids below model.vocab_size=61"):
            replace(TRIMMED, output_tokens=ids)
    assert uncovered(TRIMMED, replace(TRIMMED, output_tokens=(3, 4, 60))) == [
        "output_tokens: the backbone's head lacks 1 of the tokens"]
    narrower = replace(TRIMMED, output_tokens=(5, 60))
    state = prune(TRIMMED, trimmed().state_dict(), random_importance(TRIMMED), narrower)
    assert torch.equal(state["head.weight"], trimmed().head.weight[[1, 5]])


def test_loss_and_scores_count_only_what_the_head_can_say():
    model, target = trimmed(), labels()
    logits = model(TOKENS)
    expected = F.cross_entropy(logits[target >= 0], target[target >= 0], reduction="sum")
    some = target.clone()
    some[0, 0] = 7  # not in the head: no loss in training, impossible in evaluation
    module = TrainableModel(model)
    torch.testing.assert_close(module(TOKENS, None, torch.where(target >= 0, target, -100)), expected)
    inside = F.cross_entropy(logits[1:][target[1:] >= 0], target[1:][target[1:] >= 0], reduction="sum")
    first = torch.where(torch.arange(2)[:, None] == 0, 7, target)
    torch.testing.assert_close(module(TOKENS, None, first), inside)
    nll = decoder_nll(model)(TOKENS, None, some)
    assert torch.isinf(nll[0, 0]) and torch.isfinite(nll.flatten()[1:]).all()
    both = decoder_nll_and_misses(model)(TOKENS, None, target)
    torch.testing.assert_close(both[..., 0].sum(), expected)
    assert set(both[target >= 0][:, 1].tolist()) <= {0.0, 1.0}


def test_distillation_compares_over_what_the_head_can_say():
    parent = decoder()
    student = decoder(TRIMMED, seed=3).requires_grad_(True)
    target = labels()
    loss = TrainableModel(student, DistillConfig(teacher="x"))(TOKENS, None, target, TeacherModel(parent)(TOKENS, None))
    seen = [student(TOKENS)[..., list(IDS)], parent(TOKENS)[..., list(IDS)]]
    torch.testing.assert_close(loss, kl_divergence(*seen, target >= 0))
    loss.backward()
    assert student.head.weight.grad.abs().sum() > 0


def test_generation_says_only_those():
    assert set(generate(trimmed(), [1, 2, 3], 12, temperature=1.0)) <= set(IDS)


PARENT = replace(MODEL, hidden_size=64, head_dim=32, ffn_size=128)


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    """Pre-trained, then tuned on conversations."""
    folder = tmp_path_factory.mktemp("guard")
    base = pretrain_job(folder, steps=15, lr=1e-2, model=PARENT)
    run_job(base)
    chat = change(base, stage="sft", init_from=f"{base.output_dir}/pretrain", data=chat_data(folder), seq_len=64, steps=15)
    run_job(chat)
    return folder, chat


def test_a_guard_is_cut_taught_and_quantized(parent, tmp_path: Path):
    """Llama Guard 3-1B-INT4's path in small: fewer blocks and channels, a trimmed head, the parent teaches, QAT ends it."""
    folder, chat = parent
    loaded = load_model(chat.output_dir)
    data = prepare_stage(chat.config.data, loaded.tokenizer, 64, chat.cache_dir, 0)
    chosen = frequent_outputs(data, 300, 24, always=(end_of_turn_id(loaded.tokenizer),))
    assert len(chosen.ids) == 24 and end_of_turn_id(loaded.tokenizer) in chosen.ids and 0.5 < chosen.coverage < 1
    assert frequent_outputs(data, 300, 299).coverage == 1
    with pytest.raises(ValueError, match="head of 0 tokens"):
        frequent_outputs(data, 300, 0)
    guard = replace(PARENT, num_layers=1, ffn_size=96, tie_embeddings=False, output_tokens=chosen.ids)
    scores = calibrate_checkpoint(chat.output_dir, chat.config.data, Calibration(sequences=8, seq_len=64), chat.cache_dir)
    start = prune_checkpoint(chat.output_dir, scores, guard, tmp_path / "start")
    assert asdict(load_model(start).model.config)["output_tokens"] == chosen.ids
    taught = change(chat, model=guard, init_from=str(tmp_path / "start"), output_dir=str(tmp_path / "run"), lr=1e-2,
                    distill=DistillConfig(teacher=chat.output_dir, weight=0.7))  # fmt: skip
    run_job(taught)
    assert losses(taught)[-1] < 0.95 * losses(taught)[0]
    aware = change(taught, stage="qat", init_from=f"{tmp_path}/run/sft", quant=QuantSpec(), lr=1e-3, steps=3,
                   distill=DistillConfig(teacher="init"))  # fmt: skip
    path = run_job(aware).checkpoint
    loaded = load_model(path)
    said = loaded.model
    assert isinstance(said.config, ModelConfig) and said.head.weight.shape == (24, 64)
    export_packed(path, tmp_path / "guard.pocket")
    _check_packed(tmp_path / "guard.pocket", loaded)
    with pytest.raises(ConversionError, match="says 24 of 300 tokens"):
        export_hf(path, tmp_path / "hf")


def _check_packed(path: Path, loaded: LoadedModel) -> None:
    """The runtime says what the checkpoint says: logits, scores, text, and nothing outside the head."""
    packed, ids = load_packed(path), loaded.tokenizer.encode("the model reads a word and then")
    session = packed.session(64)
    logits, expected = session.eval(ids, all_logits=True), loaded.model(torch.tensor([ids]))[0].numpy()
    outputs = list(loaded.model.config.output_tokens)
    assert np.isinf(np.delete(logits, outputs, axis=1)).all()
    largest = np.abs(expected[:, outputs]).max()
    np.testing.assert_allclose(logits[:, outputs], expected[:, outputs], rtol=0, atol=1e-3 * largest)
    rows = [Row(ids[:-1], [label if label in outputs else -100 for label in ids[1:]])]
    torch.testing.assert_close(packed.score(rows), loaded.score(rows), rtol=1e-4, atol=1e-4)
    text = list(generate_packed(packed, ids, 16, temperature=1.0, top_p=0.9, seed=1))
    assert text and set(text) <= set(outputs)
    assert list(generate_packed(packed, ids, 16)) == list(generate(loaded.model, ids, 16))


@pytest.mark.parametrize("bad", [[], [5, 3], [3, 3], [300], [-1], ["a"], 3, list(range(301))])
def test_a_packed_file_with_wrong_output_tokens_is_refused(tmp_path: Path, bad):
    config = replace(PARENT, tie_embeddings=False, output_tokens=(3, 5, 9))
    model = decoder(config)
    wrong = tmp_path / "wrong.pocket"
    with pytest.MonkeyPatch.context() as patch:
        described = {**model_metadata(config), "output_tokens": bad}
        patch.setattr("stages.export_packed.model_metadata", lambda _: described)
        pack_model(model, wrong)
    with pytest.raises(ValueError, match="output_tokens|head"):
        PackedModel(wrong)
