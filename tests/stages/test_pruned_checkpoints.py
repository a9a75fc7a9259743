"""Pruned checkpoints: what they hold, that every stage starts from them, what is refused."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from modeling.prune import prune
from stages.checkpoint import read_document, resolve
from stages.errors import CheckpointError, InputError
from stages.importance_file import Calibration, calibrate_checkpoint, load_scores
from stages.lineage import Lineage
from stages.loading import load_model
from stages.prune import PruneOptions, prune_checkpoint
from tests.helpers.stage_jobs import MODEL, change, chat_data, losses, pretrain_job, qat_checkpoint, run_job

TARGET = replace(MODEL, num_layers=1, hidden_size=24, ffn_size=40, attention=("skip",))


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    job = pretrain_job(tmp_path_factory.mktemp("backbone"), steps=12, lr=1e-2)
    run_job(job)
    return job


@pytest.fixture(scope="module")
def importance(job) -> Path:
    return calibrate_checkpoint(job.output_dir, job.config.data, Calibration(sequences=4, seq_len=32), job.cache_dir)


def test_a_pruned_checkpoint_loads_and_says_where_it_came_from(job, importance, tmp_path):
    options = PruneOptions(variant="energy", layers="loss")
    path = prune_checkpoint(job.output_dir, importance, TARGET, tmp_path / "small", options)
    loaded, backbone = load_model(tmp_path / "small"), load_model(job.output_dir)
    assert loaded.path == path and loaded.model.config == TARGET
    chosen = load_scores(importance)[0].importance("energy", "loss")
    for name, tensor in prune(MODEL, backbone.model.state_dict(), chosen, TARGET).items():
        assert torch.equal(loaded.model.state_dict()[name], tensor), name
    assert loaded.tokenizer.fingerprint == backbone.tokenizer.fingerprint
    lineage = loaded.lineage
    assert lineage.parent == str(resolve(job.output_dir)) and lineage.tokens_seen == backbone.lineage.tokens_seen > 0
    assert lineage.pruning["importance"] == importance.stem and lineage.pruning["variant"] == "energy"
    assert lineage.pruning["backbone"]["ffn_size"] == 64 and lineage.pruning["blocks"][0]["attention"] == "skip"


def test_stages_start_from_it_as_it_is(job, importance, tmp_path):
    prune_checkpoint(job.output_dir, importance, TARGET, tmp_path / "small")
    inherited = change(job, model=TARGET, init_from=str(tmp_path / "small"), output_dir=str(tmp_path / "go"), steps=3)
    result = run_job(inherited)
    lineage = Lineage.from_dict(read_document(result.checkpoint, "lineage"))
    assert lineage.parent == str(tmp_path / "small/checkpoints/step-000000")
    assert lineage.tokens_seen == (12 + 3) * 4 * 32 and lineage.pruning is None
    fresh = change(job, model=TARGET, output_dir=str(tmp_path / "fresh"), steps=3)
    run_job(fresh)
    assert losses(inherited)[0] < losses(fresh)[0] - 0.1
    chat = change(inherited, stage="sft", data=chat_data(tmp_path), seq_len=64, output_dir=str(tmp_path / "chat"))
    assert run_job(chat).step == 3
    with pytest.raises(CheckpointError, match=r"model.hidden_size=24, the recipe has 32"):
        run_job(change(inherited, model=MODEL, output_dir=str(tmp_path / "other")))


def test_longer_context_of_a_later_stage_is_inherited(job, tmp_path):
    longer = change(job, stage="midtrain", init_from=job.output_dir, output_dir=str(tmp_path / "mid"), steps=1,
                    max_positions=128, rope_theta=40_000.0)  # fmt: skip
    run_job(longer)
    scores = calibrate_checkpoint(tmp_path / "mid", job.config.data, Calibration(sequences=2, seq_len=32), job.cache_dir)
    path = prune_checkpoint(tmp_path / "mid", scores, TARGET, tmp_path / "small")
    config = load_model(path).model.config
    assert (config.max_positions, config.rope_theta) == (128, 40_000.0)


def test_what_does_not_fit_is_refused_and_nothing_is_left(job, importance, tmp_path):
    with pytest.raises(InputError, match=r"ffn_size 96 is larger than the backbone's 64"):
        prune_checkpoint(job.output_dir, importance, replace(MODEL, ffn_size=96), tmp_path / "big")
    other = tmp_path / "other"
    shutil.copytree(job.output_dir, other)
    other_job = change(job, output_dir=str(other), steps=13)
    run_job(other_job)
    with pytest.raises(InputError, match="is the importance of .*step-000012, not of .*step-000013"):
        prune_checkpoint(other, importance, TARGET, tmp_path / "big")
    aware = qat_checkpoint(tmp_path / "qat")
    for work in (lambda: prune_checkpoint(aware, importance, TARGET, tmp_path / "big"),
                 lambda: calibrate_checkpoint(aware, job.config.data, Calibration(seq_len=32), job.cache_dir)):
        with pytest.raises(InputError, match="quantization-aware"):
            work()
    assert not (tmp_path / "big").exists()
