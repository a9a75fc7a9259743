"""Two budgets in a search's recipe, its record and its page."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest

from launch.sweep_config import load_sweep
from launch.sweep_report import render_sweep
from launch.sweep_run import record_of, sweep_plan
from search.store import Store
from stages.errors import InputError

pytest.importorskip("botorch", reason="the search extra is not installed")


def test_the_recipe_says_how_short_a_training_may_be():
    sweep = load_sweep("smoke_search", {"quality.short_tokens": "128"})
    assert sweep_plan(sweep).short_tokens == 128 and sweep_plan(load_sweep("smoke_search", {})).short_tokens == 0
    assert sweep.comparable()["quality"]["short_tokens"] == 128
    with pytest.raises(InputError, match="short_tokens 512 is no shorter than quality.budget_tokens 512"):
        load_sweep("smoke_search", {"quality.short_tokens": "512"})
    with pytest.raises(InputError, match="with quality.source supernet, which trains none"):
        load_sweep("smoke_search", {"quality.short_tokens": "128", "quality.source": "supernet"})
    with pytest.raises(InputError, match="with optimizer tpe, which would take a predicted loss for a measured one"):
        load_sweep("smoke_search", {"quality.short_tokens": "128", "optimizer": "tpe"})


def test_the_page_says_which_trials_were_trained_briefly_and_none_is_on_the_front(tmp_path: Path):
    sweep = load_sweep("smoke_search", {"quality.short_tokens": "128"})
    space = sweep.make_space()
    flats = [{**space.flat_choices(), **dict.fromkeys((f"attention.{i}" for i in range(4)), "full"), "num_layers": 4,
              "hidden_size": 64, "ffn_size": width, "num_heads": 2, "num_kv_heads": 1, "head_dim": 16, "block_repeat": 1}
             for width in (64, 96, 128)]  # fmt: skip
    with Store.open(tmp_path / "sweep.db", {}) as store:
        store.add_trials([(space.key(space.unflatten(flat)), {"token": i, "candidate": flat}) for i, flat in enumerate(flats)])
        store.finish_trial(0, "ok", {"loss": 5.0, "short_loss": 6.0, "ttft_ms": 2.0})
        store.finish_trial(1, "ok", {"loss": 4.8, "short_loss": 5.9, "ttft_ms": 3.0})
        store.finish_trial(2, "ok", {"predicted_loss": 3.0, "short_loss": 5.8, "ttft_ms": 1.0}, {"predicted_loss": 0.25})
        for number in range(3):
            store.tell(number)
        record = record_of(sweep, store, tmp_path)
    assert [trial.short for trial in record.trials] == [False, False, True]
    assert [point.trial for point in record.front] == [0, 1], "the fastest, and best by its prediction, but not trained"
    assert record.trials[2].values()["loss"] == 3.0 and record.trials[2].results == {"short_loss": 5.8, "ttft_ms": 1.0}
    assert record.ranking is not None and record.ranking.pairs == ((6.0, 5.0), (5.9, 4.8)) and record.ranking.kendall == 1.0
    text = render_sweep(record)
    assert "short training against the full one, 2 models: Kendall 1.00" in text
    assert "short scores are not used: Kendall tau 1.00 on 2 candidates, wanted 0.7 on 20" in text
    assert "Trained on 128 tokens alone" in text and "deviation 0.250" in text and "never on the front: trials 2." in text
    assert "2 of 2 models keep" in text or "2 of 2 judged" in text or "the best has held-out loss 4.8" in text
    assert type(record).from_json(record.to_json()).trials[2].short
    assert asdict(record)["trials"][2]["short"]
