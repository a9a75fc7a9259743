"""The loop alone: what a stage writes, how it goes on, what it refuses."""

from __future__ import annotations

import pytest

from stages.errors import InputError, NonFiniteError
from tests.helpers.stage_jobs import MODEL, change, losses, pretrain_job, read_metrics, run_job


def test_a_stage_learns_and_says_so_step_by_step(tmp_path):
    job = pretrain_job(tmp_path, steps=30, log_every=10)
    result = run_job(job)
    rows = read_metrics(job)
    assert [row["step"] for row in rows] == [1, 10, 20, 30]
    assert rows[-1]["loss"] < 0.8 * rows[0]["loss"]
    assert set(rows[0]) == {"stage", "step", "tokens", "loss", "lr", "grad_norm", "tokens_per_second", "step_seconds",
                            "data_seconds", "window_steps"}  # fmt: skip
    assert rows[-1]["tokens"] == 30 * 4 * 32
    assert result.step == 30 and result.checkpoint.name == "step-000030"


def test_twenty_sequences_are_learnt_by_heart(tmp_path):
    wide = type(MODEL)(**{**vars(MODEL), "hidden_size": 64, "num_heads": 4, "ffn_size": 192})
    job = pretrain_job(tmp_path, model=wide, steps=200, lr=1e-2, global_batch=20, log_every=200)
    sources = tuple(type(s)(**{**vars(s), "max_bytes": 2_500}) for s in job.config.data.sources)
    run_job(change(job, data=type(job.config.data)(**{**vars(job.config.data), "sources": sources})))
    first, last = losses(job)
    assert first > 5.0 and last < 0.35


def test_accumulating_micro_batches_changes_nothing(tmp_path):
    whole = pretrain_job(tmp_path)
    cut = change(whole, micro_batch=1, output_dir=str(tmp_path / "cut"))
    run_job(whole)
    run_job(cut)
    assert losses(cut) == pytest.approx(losses(whole), rel=1e-5)


def test_checkpointed_activations_change_nothing(tmp_path):
    plain = pretrain_job(tmp_path)
    checkpointed = change(plain, activation_checkpointing="block", output_dir=str(tmp_path / "other"))
    run_job(plain)
    run_job(checkpointed)
    assert losses(checkpointed) == pytest.approx(losses(plain), rel=1e-6)


def test_bf16_follows_fp32(tmp_path):
    plain = pretrain_job(tmp_path)
    half = change(plain, precision="bf16", output_dir=str(tmp_path / "half"))
    run_job(plain)
    run_job(half)
    assert losses(half) == pytest.approx(losses(plain), rel=0.01) and losses(half) != losses(plain)


def test_a_stopped_stage_goes_on_bit_for_bit_and_logs_no_step_twice(tmp_path):
    straight = pretrain_job(tmp_path, steps=8)
    run_job(straight)
    job = change(straight, output_dir=str(tmp_path / "stopped"), every=3)
    _run_until(job, step=5)
    assert [row["step"] for row in read_metrics(job)] == [1, 2, 3, 4, 5]
    run_job(job)
    assert [row["step"] for row in read_metrics(job)] == list(range(1, 9))
    assert losses(job) == losses(straight)


def _run_until(job, step):
    """Stop as a kill would: after `step` was logged and before anything else happens."""
    from stages.metrics import MetricsFile

    write = MetricsFile.write

    def write_and_stop(self, row):
        write(self, row)
        if row["step"] == step:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MetricsFile, "write", write_and_stop)
        with pytest.raises(KeyboardInterrupt):
            run_job(job)


@pytest.mark.parametrize("seed", [2**63 - 1, -1])
def test_the_largest_seed_trains_too(tmp_path, seed):
    job = pretrain_job(tmp_path, steps=1, seed=seed)
    assert run_job(job).step == 1


def test_a_complete_stage_is_skipped(tmp_path):
    job = pretrain_job(tmp_path, steps=2)
    assert not run_job(job).skipped
    before = (job.folder / "metrics.jsonl").read_bytes()
    assert run_job(job).skipped
    assert (job.folder / "metrics.jsonl").read_bytes() == before


def test_a_diverging_run_stops_before_the_step_and_names_the_last_good_checkpoint(tmp_path, monkeypatch):
    from stages.objectives import TrainableModel

    forward, calls = TrainableModel.forward, []

    def poisoned(self, *args, **kwargs):
        calls.append(None)
        return forward(self, *args, **kwargs) * (float("nan") if len(calls) == 4 else 1.0)

    monkeypatch.setattr(TrainableModel, "forward", poisoned)
    job = pretrain_job(tmp_path, every=2)
    with pytest.raises(NonFiniteError, match=r"pretrain step 4: loss nan.*step-000002.*lower pretrain.optim.lr"):
        run_job(job)
    assert [row["step"] for row in read_metrics(job)] == [1, 2, 3]


def test_clipping_bounds_the_update_and_reports_the_norm_before(tmp_path):
    free = pretrain_job(tmp_path, steps=2, clip_norm=0.0)
    clipped = change(free, clip_norm=1e-3, output_dir=str(tmp_path / "clipped"))
    run_job(free)
    run_job(clipped)
    assert read_metrics(clipped)[0]["grad_norm"] == read_metrics(free)[0]["grad_norm"] > 0.1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(replicate=2), "parallel.replicate=2 with 1 workers"),
        (dict(seq_len=128), "pretrain.seq_len=128 is longer than the model's 64 positions"),
        (dict(log_every=0), "train.log_every=0"),
        (dict(stage="midtrain"), "midtrain starts from a trained model and got none"),
    ],
)
def test_a_job_that_cannot_run_is_refused_before_anything_is_written(tmp_path, changes, message):
    job = pretrain_job(tmp_path, **changes)
    with pytest.raises(InputError, match=message):
        run_job(job)
    assert not job.folder.exists() and not (tmp_path / "cache").exists()


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    job = pretrain_job(tmp_path, steps=2)
    run_job(job)
    other = type(job.model)(**{**vars(job.model), "ffn_size": 96})
    with pytest.raises(InputError, match=r"another model: model.ffn_size=64, the recipe has 96"):
        run_job(change(job, model=other, steps=4))


def test_changed_data_is_refused_on_resume(tmp_path):
    from tests.helpers.stage_jobs import write_texts

    job = pretrain_job(tmp_path, steps=2)
    run_job(job)
    write_texts(tmp_path / "texts.jsonl", seed=5)
    with pytest.raises(InputError, match="is not what .* was trained on"):
        run_job(change(job, steps=4))


def test_a_clipped_optimizer_state_has_decay_on_matrices_only():
    import torch
    from torch import nn

    from stages.config import OptimConfig
    from stages.optim import build_optimizer

    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.RMSNorm(4))
    groups = build_optimizer(model, OptimConfig(lr=1.0, weight_decay=0.3)).param_groups
    assert [(group["weight_decay"], [p.ndim for p in group["params"]]) for group in groups] == [(0.3, [2]), (0.0, [1])]
    assert all(isinstance(p, torch.Tensor) for group in groups for p in group["params"])
