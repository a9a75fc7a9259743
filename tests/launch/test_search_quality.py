"""Scoring a candidate through the real stages: inherited, trained, scored, found again; and what it says of bad ones."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from launch import ray_runner
from launch.search_quality import PrunedTraining, read_quality
from search.quality import TrainedScorer
from stages.config import OptimConfig
from stages.errors import InputError, NonFiniteError, RunError
from tests.helpers.pruned_training import pruned_training, train_backbone
from tests.helpers.stage_jobs import MODEL

TOKENS = 4 * 32 * 6


@pytest.fixture(scope="module")
def backbone(tmp_path_factory) -> Path:
    return train_backbone(tmp_path_factory.mktemp("backbone"))


@pytest.fixture
def training(backbone: Path, tmp_path: Path) -> PrunedTraining:
    return pruned_training(backbone, tmp_path / "trials")


def test_a_candidate_is_pruned_trained_and_scored_once(training: PrunedTraining):
    candidate = replace(MODEL, ffn_size=48)
    quality = TrainedScorer(training).score(candidate, TOKENS, 0)
    assert quality.status == "ok" and quality.tokens == TOKENS
    assert quality.loss < quality.start_loss < 5.7, "inherited weights know more than random ones (log 300), training adds"
    trial = Path(training.folder) / training.key(candidate, TOKENS, 0)
    rows = [json.loads(line) for line in (trial / "pretrain/metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 6
    assert not list(trial.rglob("*.safetensors")), "only the score and the metrics stay"
    again = training(candidate, TOKENS, 0)
    assert again == quality and not (trial / "inherited").exists()
    (trial / "quality.json").write_text("{")
    assert read_quality(trial / "quality.json") is None
    redone = training(candidate, TOKENS, 0)
    assert (redone.loss, redone.start_loss) == (quality.loss, quality.start_loss), "the same seed gives the same score"


def test_inheriting_beats_random_weights_at_the_same_budget(training: PrunedTraining):
    candidate = replace(MODEL, ffn_size=48)
    scratch = replace(training, backbone="", importance="")
    assert training(candidate, TOKENS, 0).loss < scratch(candidate, TOKENS, 0).loss - 0.1


def test_a_teacher_changes_the_score_and_the_key(training: PrunedTraining):
    candidate = replace(MODEL, num_layers=1)
    taught = replace(training, distill_weight=0.5, keep=True)
    assert taught.key(candidate, TOKENS, 0) != training.key(candidate, TOKENS, 0)
    quality = taught(candidate, TOKENS, 0)
    assert quality.status == "ok"
    kept = Path(taught.folder) / taught.key(candidate, TOKENS, 0)
    assert list((kept / "pretrain/checkpoints").glob("step-*")) and (kept / "inherited").is_dir()


def test_divergence_is_infeasible_with_its_reason_and_remembered(training: PrunedTraining):
    wild = replace(training.recipe.pretrain, optim=OptimConfig(lr=1e30))
    broken = replace(training, recipe=replace(training.recipe, pretrain=wild))
    quality = broken(MODEL, TOKENS, 0)
    assert (quality.status, quality.loss) == ("infeasible", None)
    assert "nan" in quality.reason or "inf" in quality.reason
    assert broken(MODEL, TOKENS, 0) == quality


def test_a_candidate_larger_than_the_backbone_is_infeasible_by_dimension(training: PrunedTraining):
    quality = training(replace(MODEL, ffn_size=80, num_layers=3), TOKENS, 0)
    assert quality.status == "infeasible"
    assert "ffn_size 80 is larger than the backbone's 64" in quality.reason and "num_layers 3" in quality.reason


def test_keys_tell_apart_what_changes_a_score(training: PrunedTraining):
    other_lr = replace(training.recipe.pretrain, optim=OptimConfig(lr=1e-3))
    keys = {
        training.key(MODEL, TOKENS, 0), training.key(MODEL, TOKENS, 1), training.key(MODEL, 2 * TOKENS, 0),
        training.key(replace(MODEL, ffn_size=48), TOKENS, 0), replace(training, variant="taylor").key(MODEL, TOKENS, 0),
        replace(training, recipe=replace(training.recipe, pretrain=other_lr)).key(MODEL, TOKENS, 0),
        replace(training, metric="bits_per_byte").key(MODEL, TOKENS, 0),
    }  # fmt: skip
    assert len(keys) == 7


@pytest.mark.parametrize(
    "changes, words",
    [(dict(stage="sft"), "no sft stage"), (dict(metric="accuracy"), "metric 'accuracy'"),
     (dict(held_out="books"), "no held-out set 'books'"), (dict(importance=""), "importance")],
)  # fmt: skip
def test_what_makes_no_sense_is_refused_before_anything_trains(training: PrunedTraining, changes, words):
    with pytest.raises(InputError, match=words):
        replace(training, **changes)


@pytest.mark.parametrize("kind", [NonFiniteError, RunError, InputError])
def test_a_worker_on_ray_reports_its_error_as_what_it_was(kind, monkeypatch):
    monkeypatch.setattr(ray_runner, "_kv_get", lambda key: {"kind": kind.__name__, "message": "loss nan"})
    with pytest.raises(kind, match="loss nan") as caught:
        ray_runner._raise_reported("key")
    assert type(caught.value) is kind
