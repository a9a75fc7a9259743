"""Two workers and one: the same importance, and the same training of a pruned, taught, head-trimmed model under FSDP."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from data_pipeline.prepare import ensure_tokenizer, prepare_stage
from stages.config import DistillConfig
from stages.distributed import Process
from stages.importance_file import Calibration, calibrate_checkpoint, load_scores
from stages.output_tokens import frequent_outputs
from stages.prune import prune_checkpoint
from tests.helpers.distributed import run_distributed
from tests.helpers.stage_jobs import MODEL, change, losses, pretrain_job, run_job


def test_two_workers_equal_one(tmp_path):
    base = pretrain_job(tmp_path, steps=4, lr=1e-2)
    run_job(base)
    data, options = base.config.data, Calibration(sequences=4, seq_len=32, micro_batch=2, drop_batches=2)
    alone = calibrate_checkpoint(base.output_dir, data, options, base.cache_dir)
    tokenizer = ensure_tokenizer(base.tokenizer, data, base.cache_dir, 0)
    chosen = frequent_outputs(prepare_stage(data, tokenizer, 32, base.cache_dir, 0), 300, 25)
    target = replace(MODEL, num_layers=1, ffn_size=48, hidden_size=24, tie_embeddings=False, output_tokens=chosen.ids)
    prune_checkpoint(base.output_dir, alone, target, tmp_path / "small")
    teacher = DistillConfig(teacher=base.output_dir, weight=0.5)
    job = change(base, model=target, init_from=str(tmp_path / "small"), output_dir=str(tmp_path / "one"), distill=teacher)
    run_job(job)
    # The pair calibrates a copy of the backbone's folder, so that it finds no answer there.
    (tmp_path / "run").rename(tmp_path / "backbone")
    for path in (tmp_path / "backbone/pretrain/importance").iterdir():
        path.rename(tmp_path / path.name)
    pair = change(job, output_dir=str(tmp_path / "two"), distill=replace(teacher, teacher=str(tmp_path / "backbone")))
    paths = run_distributed(_pair, 2, args=(pair, str(tmp_path / "backbone"), data, options))
    assert losses(pair) == pytest.approx(losses(job), rel=1e-5)
    found, expected = load_scores(paths[0])[0], load_scores(tmp_path / alone.name)[0]
    assert paths[0] == paths[1] and found.tokens == expected.tokens
    for name, tensor in expected.tensors.items():
        torch.testing.assert_close(found.tensors[name], tensor, rtol=1e-4, atol=1e-6, msg=name)


def _pair(job, backbone, data, options, rank, world):
    path = calibrate_checkpoint(backbone, data, options, job.cache_dir, Process(rank, world, rank))
    run_job(job, rank, world)
    return str(path)
