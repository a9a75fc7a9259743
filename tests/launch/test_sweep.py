"""`launch/sweep.py` as a user runs it: a search on a modelled phone, its picks, and what it refuses."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("botorch", reason="the search extra is not installed")

from launch.sweep_config import from_dict, load_sweep, save_sweep, to_dict
from launch.sweep_optimizer import optimizer_maker
from launch.sweep_run import prepare_backbone, sweep_plan
from launch.sweep_score import score
from launch.sweep_supernet import extract_pick
from launch.sweeps import SWEEPS
from search.optim.catalog import KINDS
from search.service import SweepError
from search.store import Store
from stages.errors import InputError
from stages.loading import load_model
from tests.helpers.wandb_rows import logged

ROOT = Path(__file__).resolve().parents[2]


def command(name, *arguments, cwd):
    command = [sys.executable, str(ROOT / "launch" / f"{name}.py"), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=230)


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """(directory, what the command printed) of the smoke search, without the data folder."""
    folder = tmp_path_factory.mktemp("sweep")
    done = command("sweep", "--recipe", "smoke_search", "--output-dir", folder / "s", "--trials", "4", cwd=folder)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder / "s", done


def test_a_search_ends_with_a_front_and_says_it(searched):
    directory, done = searched
    front = json.loads((directory / "front.json").read_text())
    assert front and all(point["loss"] > 0 and point["ttft_ms"] > 0 and point["predicted_ttft_ms"] > 0 for point in front)
    assert "model of time to first token" in done.stdout and f"trial {front[0]['trial']}" in done.stdout
    assert "held-out loss" in (directory / "report.html").read_text()
    assert command("sweep", "check", directory, cwd=directory).stdout.startswith("the database and the optimizer's state agree")


def test_a_search_is_watched(searched):
    directory, done = searched
    rows = logged(directory)
    assert [row["trial/number"] for row in rows if "trial/number" in row] == sorted(range(4), key=lambda n: told(directory)[n])
    assert rows[-1]["front/nrows"] >= 1 and rows[-1]["round/trials"] == 4
    page = (directory / "report.html").read_text()
    assert "reading, held out of the fit" in page and "<th>parameters</th>" in page, "a real search has pairs and proxies"
    assert "and what it said of trials 4 trials: median" in " ".join(done.stdout.replace("│", " ").split())
    front = json.loads((directory / "front.json").read_text())
    confirmed = [point for point in front if point["confirmed"]]
    assert confirmed and all("loss" in point["intervals"] for point in confirmed)


def told(directory):
    with Store.read(directory / "sweep.db") as store:
        return {trial.number: trial.told for trial in store.trials()}


def test_a_search_is_replayed_from_its_database(searched):
    directory, _ = searched
    done = command("sweep", "replay", directory, "--optimizer", "staged", cwd=directory)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("the optimizer asks the same again: 4 trials in") and done.stdout.endswith(", 4 answers\n")
    done = command("sweep", "replay", directory, "--optimizer", "tpe", cwd=directory)
    assert done.returncode == 2 and "this sweep's is staged, and only its questions have answers" in done.stderr


def test_a_pick_is_a_recipe_that_starts_from_the_inherited_checkpoint(searched, tmp_path):
    directory, _ = searched
    done = command("sweep", "export", directory, "--output", tmp_path / "picks", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    [folder] = (tmp_path / "picks").iterdir()
    expected = json.loads((folder / "expected.json").read_text())
    band = expected["predicted"]["ttft_ms"]
    assert 0 < band["low"] < band["value"] < band["high"] and expected["device"] == ["model:oneplus_12"]
    assert expected["search"]["ttft_ms"] > 0 and expected["search"]["loss"] > 0
    done = command("pretrain", "--recipe", folder / "recipe.toml", "--init-from", folder, "--output-dir", tmp_path / "run",
                   "--tracking.wandb", "disabled", cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    scores = json.loads((tmp_path / "run" / "pretrain" / "evaluation.json").read_text())
    assert scores["after"]["pretrain"]["loss"] < scores["before"]["pretrain"]["loss"]


def test_what_is_wrong_is_one_line(searched, tmp_path):
    directory, _ = searched
    for arguments, words in [
        (("--recipe", "smoke_search", "--output-dir", directory), "already holds a sweep"),
        (("--recipe", "smoke_serch",), "did you mean 'smoke_search'"),
        (("--recipe", "smoke_search", "--optimizer", "simplex"), "optimizer='simplex': Input should be 'staged', 'bo"),
        (("--recipe", "smoke_search", "--device", "phone", "--output-dir", tmp_path / "x"), "device 'phone'; expected one of"),
        (("export", directory, "--pick", "99", "--output", tmp_path / "p"), "the front has"),
        (("export", directory, "--output", directory / "sweep.toml"), "is a file; name a folder"),
        (("status", tmp_path), "holds no sweep"),
    ]:
        done = command("sweep", *arguments, cwd=tmp_path)
        assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr, done.stderr
        assert done.stderr.count("error:") == 1
    silent = command("sweep", "--recipe", "smoke_search", "--device", "agent://127.0.0.1:1", "--output-dir", tmp_path / "y",
                     cwd=tmp_path)  # fmt: skip
    assert silent.returncode == 1 and "device agent://127.0.0.1:1 does not answer" in silent.stderr
    assert "Traceback" not in silent.stderr
    assert not (tmp_path / "y").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_a_search_takes_the_optimizer_that_it_is_told(kind):
    sweep = load_sweep("smoke_search", {"optimizer": kind})
    assert sweep.comparable()["optimizer"] == kind
    space = sweep.make_space()
    optimizer = optimizer_maker(kind)(space, sweep_plan(sweep), lambda name, flats: (np.ones(len(flats)), 0))
    assert optimizer.kind == kind
    for token, flat in optimizer.ask(3):
        assert not space.violations(space.unflatten(flat))
        optimizer.tell(token, {"loss": 3.0, "ttft_ms": 2.0}, {"ttft_ms": 0.1})


@pytest.mark.parametrize("name", SWEEPS)
def test_every_search_is_valid_and_reads_back(name):
    sweep = SWEEPS[name]()
    assert from_dict(to_dict(sweep), name) == sweep and sweep.make_space().size() > 40


def test_a_space_that_the_backbone_does_not_cover_is_refused():
    with pytest.raises(InputError, match="space.ffn_size goes up to 4096, the backbone has 128"):
        load_sweep("smoke_search", {"space.ffn_size": "[64, 4096]"})
    with pytest.raises(InputError, match="no feasible point"):
        load_sweep("smoke_search", {"space.limits.memory_bytes": "10"})


def test_a_pick_is_trained_through_all_stages_packed_and_held_against_its_prediction(searched):
    directory, _ = searched
    [final] = [json.loads(path.read_text()) for path in (directory / "picks").glob("trial-*/final.json")]
    folder = directory / "picks" / f"trial-{final['trial']:04d}"
    expected = json.loads((folder / "expected.json").read_text())
    band = expected["predicted"]["ttft_ms"]
    assert final["ttft_ms"] == pytest.approx(band["value"], rel=0.1)
    assert set(final["losses"]) == {"pretrain", "midtrain", "sft", "qat"}
    assert final["loss"] == final["losses"]["pretrain"]["pretrain"] and 0 < final["loss"] < 7
    assert (directory / final["run"] / "export" / "model.pocket").is_file()
    page = (directory / "report.html").read_text()
    assert "No model was exported" not in page and f"picks/trial-{final['trial']:04d}" in page


def test_goals_that_make_no_sense_are_refused():
    for overrides, words in [
        ({"goal.objectives": '["loss", "decode_ms"]'}, "decode_ms, which has no limit; set goal.limits.decode_ms"),
        ({"goal.objectives": '["ttft_ms"]'}, "expected loss first"),
        ({"goal.limits": '{"ttft_ms@512x1" = 3.0}'}, "ttft_ms@512x1, which is not measured; measured are ttft_ms, decode_ms"),
        ({"goal.limits": '{"speed" = 3.0}'}, "speed, which is not measured"),
        ({"goal.limits": '{"ttft_ms" = 3.0}'}, "limits has ttft_ms; its limit is goal.ttft_ms"),
        ({"device.processor_time": "true", "device.threads": "2"}, "processor_time says nothing"),
        ({"retrain_steps": '{"warmup" = 3}'}, "retrain_steps"),
        ({"space.limits.memory_bytes": "x"}, "space.limits.memory_bytes='x'; expected a whole number"),
        ({"space.limits.weight_bits": "nan"}, "space.limits.weight_bits=nan; expected a number"),
        ({"space.limits": "3"}, "space.limits=3 is no table"), ({"space.fixed": "3"}, "space.fixed=3 is no table"),
        ({"space.fixed.vocab_size": "10"}, "space.fixed.vocab_size=10, the backbone has"),
        ({"device.max_readings": "5"}, "readings=16 is more than max_readings=5"),
        ({"device.min_repeats": "50"}, "min_repeats=50 is more than max_repeats=30"),
        ({"device.names": '["local", "local"]'}, "has a device twice"),
    ]:
        with pytest.raises(InputError, match=re.escape(words)):
            load_sweep("smoke_search", overrides)
    both = {"device.also": "[{prompt_tokens = 32}]", "goal.limits": '{"ttft_ms@32x1" = 3.0, "decode_ms" = 1.0}',
            "goal.objectives": '["loss", "ttft_ms", "decode_ms"]'}  # fmt: skip
    plan = sweep_plan(load_sweep("smoke_search", both))
    assert plan.references.keys() == {"loss", "ttft_ms", "decode_ms"} and plan.limits == {"ttft_ms@32x1": 3.0}


def test_a_supernet_is_a_second_source_of_quality(tmp_path, monkeypatch):
    monkeypatch.delenv("POCKETFORGE_DATA", raising=False)
    sweep, said = load_sweep("smoke_search", {"quality.source": "supernet", "quality.supernet_steps": "3"}), []
    save_sweep(sweep, tmp_path / "sweep.toml")
    folder, importance = prepare_backbone(sweep, tmp_path, said.append)
    assert said == ["training the supernet, 3 steps of 4 architectures each"]
    assert prepare_backbone(sweep, tmp_path, said.append)[0] == folder and len(said) == 1, "trained once"
    space = sweep.make_space()
    candidate = space.sample(random.Random(1), 1)[0]
    task = [str(path) for path in (tmp_path / "sweep.toml", folder, importance, tmp_path / "scores")]
    scored = score({"task": task, "candidate": space.flatten(candidate)})
    assert 4 < scored["loss"] < 7
    config = space.to_config(candidate)
    extract_pick(sweep, tmp_path, config, tmp_path / "pick")
    assert load_model(tmp_path / "pick").model.config == config


def test_a_limit_that_cannot_be_kept_says_what_saves_the_backbones_training(tmp_path, monkeypatch):
    from launch import sweep as command_module
    from launch import sweep_run

    def refuse(*_):
        raise SweepError("the best has ttft_ms 5 ms, the limit is 1; raise the limit")

    (tmp_path / "backbone").mkdir()
    monkeypatch.setattr(sweep_run, "run_sweep", refuse)
    with pytest.raises(InputError, match=r"raise the limit \(in another --output-dir; --quality.backbone .*/backbone saves"):
        command_module._run(load_sweep("smoke_search", {}), tmp_path)
