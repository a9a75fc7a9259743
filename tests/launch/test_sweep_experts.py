"""A search over dense models and mixtures as a user runs it, what is shown of mixtures, and what is refused."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

pytest.importorskip("botorch", reason="the search extra is not installed")

from launch.config import from_dict as recipe_from_dict
from launch.config import read_toml
from launch.sweep_config import load_sweep
from launch.sweep_data import TrialRecord
from launch.sweep_drawings import drawing, spoken, widest
from launch.sweep_report import render_sweep
from launch.sweep_text import shape
from launch.sweep_wandb import _experts
from modeling.config import ModelConfig
from modeling.moe_config import MoEConfig
from search.optim.base import Domain
from search.optim.encode import Encoder
from search.store import Store
from stages.errors import InputError
from tests.helpers.sweep_records import demo_record

ROOT = Path(__file__).resolve().parents[2]
MODEL = ModelConfig(vocab_size=512, hidden_size=64, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=32, ffn_size=256,
                    moe=MoEConfig(num_experts=14, top_k=2, expert_size=64, shared_size=128))  # fmt: skip


def command(*arguments, cwd):
    command = [sys.executable, str(ROOT / "launch" / "sweep.py"), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=500)


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    if not os.environ.get("POCKETFORGE_SLOW_TESTS"):
        pytest.skip("a whole search over mixtures takes two minutes; POCKETFORGE_SLOW_TESTS=1 runs it")
    folder = tmp_path_factory.mktemp("mixtures")
    options = ("--output-dir", folder / "s", "--recipe.tracking.wandb", "disabled")
    done = command("--recipe", "smoke_moe_search", *options, cwd=folder)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder / "s"


@pytest.mark.timeout(600)
def test_a_search_measures_and_trains_dense_models_and_mixtures(searched):
    with Store.read(searched / "sweep.db") as store:
        trials = store.trials("ok")
    assert len(trials) == 6
    experts = [trial.config["candidate"]["experts"] for trial in trials]
    assert set(experts) == {1, 4}
    for trial in trials:
        assert trial.results["loss"] > 0 and trial.results["ttft_ms"] > 0
        assert len(trial.key.split("-")) == (8 if trial.config["candidate"]["experts"] == 1 else 11)
    front = json.loads((searched / "front.json").read_text())
    assert all(0 < point["active_parameters"] <= point["parameters"] for point in front)
    assert all((point["active_parameters"] < point["parameters"]) == (point["candidate"]["experts"] > 1) for point in front)
    assert command("check", searched, cwd=searched).stdout.startswith("the database and the optimizer's state agree")


@pytest.mark.timeout(600)
def test_a_pick_begins_with_random_weights_and_says_its_experts(searched, tmp_path):
    [final] = [json.loads(path.read_text()) for path in (searched / "picks").glob("trial-*/final.json")]
    assert final["ttft_ms"] > 0 and set(final["losses"]) == {"pretrain", "midtrain", "sft", "qat"} and "reason" not in final
    done = command("export", searched, "--output", tmp_path / "picks", cwd=tmp_path)
    assert done.returncode == 0 and "--init-from" not in done.stdout, done.stderr
    [folder] = (tmp_path / "picks").iterdir()
    assert not (folder / "checkpoints").exists()
    recipe = recipe_from_dict(read_toml(folder / "recipe.toml"), "pick")
    with Store.read(searched / "sweep.db") as store:
        trial = next(t for t in store.trials() if t.number == int(folder.name.removeprefix("trial-")))
    assert (recipe.model.moe is None) == (trial.config["candidate"]["experts"] == 1)


def test_experts_are_in_words_drawings_and_columns():
    trial = TrialRecord(number=3, state="ok", config=asdict(MODEL), results={"loss": 2.4, "ttft_ms": 900.0})
    assert shape(trial) == "2 layers, width 64, FFN 256, 2/1 heads of 32, 14 experts of 64, 2 a token, shared 128"
    first = replace(MODEL, moe=replace(MODEL.moe, dense_layers=1, shared_size=0))
    assert "14 experts of 64, 2 a token, the first 1 layer dense: 2 with full attention" in spoken(first)
    assert spoken(replace(MODEL, moe=None)) == "2 layers, width 64, FFN 256: 2 with full attention"
    svg = drawing(MODEL, widest([MODEL]), "Trial 3")
    paths = dict(re.findall(r'<path class="(\w+)" d="([^"]+)"', svg))
    assert paths["ffn"].count("M") == 2 and paths["expert"].count("M") == 4, "a shared one and two chosen ones a layer"
    widths = [float(width) for width in re.findall(r"h([\d.]+)v", paths["expert"])]
    assert widths == pytest.approx([0.25 * 140 - 0.8] * 4, abs=0.1)
    dense_first = drawing(first, widest([first]), "Trial 4")
    assert dict(re.findall(r'<path class="(\w+)" d="([^"]+)"', dense_first))["expert"].count("M") == 2
    assert _experts(MODEL) == [14, 2, 64, 128] and _experts(replace(MODEL, moe=None)) == [None] * 4
    record = demo_record(30)
    number = record.front[0].trial
    mixed = replace(record, trials=tuple(replace(t, config=asdict(MODEL)) if t.number == number else t for t in record.trials))
    page, dense_page = render_sweep(mixed), render_sweep(record)
    assert "<small>14 experts of 64, 2 a token, shared 128</small>" in page and "experts that a token uses" in page
    assert "expert" not in re.sub(r"<style>.*?</style>", "", dense_page, flags=re.DOTALL)


def test_what_cannot_be_searched_is_one_line():
    for name, overrides, words in [
        ("smoke_search", {"space.experts": "[1, 4]"}, "space.experts [1, 4] with quality.source pruned: a mixture is not cut"),
        ("smoke_moe_search", {"quality.source": "supernet"}, "with quality.source supernet: a mixture is not cut"),
        ("smoke_moe_search", {"space.experts": "[1]", "quality.source": "pruned"}, "recipe.model has experts"),
        ("smoke_moe_search", {"quality.backbone": "runs/x"}, "leave quality.backbone empty"),
        ("smoke_moe_search", {"recipe.pretrain": "none", "recipe.train.held_out": "[]"}, "give the recipe that stage"),
        ("smoke_moe_search", {"space.granularity": "[3]", "space.experts": "[4]"}, "is not a multiple of granularity=3"),
        ("smoke_moe_search", {"space.granularity": "[8]", "space.experts": "[4]"}, "makes experts of 8, not a multiple of 32"),
        ("smoke_moe_search", {"space.shared_experts": "[-1]"}, "expected whole numbers of at least 0"),
    ]:  # fmt: skip
        with pytest.raises(InputError, match=re.escape(words)) as caught:
            load_sweep(name, overrides)
        assert "\n" not in str(caught.value)


def test_mixtures_take_the_router_of_the_recipes_model():
    space = load_sweep("smoke_moe_search", {"recipe.model.moe.score": "softmax"}).make_space()
    mixed = space.from_key("2-64-128-1-1-32-1-4-2-1-ff")
    assert space.to_config(mixed).moe == MoEConfig(num_experts=7, top_k=1, expert_size=64, shared_size=64, score="softmax",
                                                   route_scale=2.5)  # fmt: skip
    larger = load_sweep("smoke_moe_search", {"space.ffn_size": "[64, 256]"})
    assert max(larger.make_space().choices["ffn_size"]) == 256, "nothing is cut from the recipe's model"


def test_a_column_of_the_optimizer_means_the_same_whatever_candidates_are_asked_about():
    space = load_sweep("smoke_moe_search", {}).make_space()
    encoder = Encoder(Domain(choices=space.flat_choices(), repair=space.repair, feasible=space.feasible))
    flats = [space.flatten(space.from_key(f"2-64-128-1-1-32-1-4-2-{shared}-ff")) for shared in (0, 1)]
    both, alone = encoder.table(encoder.encode(flats)), encoder.table(encoder.encode(flats[1:]))
    assert (both.dense[1] == alone.dense[0]).all()
