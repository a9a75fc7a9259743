"""The command: designs, fits, plots, a tiny ladder that trains, and one line for what is wrong."""

from __future__ import annotations

import json
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from data_pipeline.config import HeldOutConfig, TokenizerConfig
from launch import scaling_law
from launch.cli import is_ours
from launch.config import LaunchConfig, Recipe, TrackingConfig, load_recipe
from launch.quantities import amount, names, size, whole_numbers
from launch.scaling_ladder import Ladder, climb
from modeling.config import ModelConfig
from search.scaling_files import Run, read_law, read_runs, runs_text
from search.scaling_law import PUBLISHED, Choice
from search.scaling_shapes import Rules, build
from stages.config import OptimConfig, StageConfig, TrainConfig
from stages.errors import InputError
from tests.helpers.commands import launch
from tests.helpers.page import Page
from tests.helpers.stage_jobs import MODEL, text_data


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["scaling_law.py", *arguments])
    scaling_law.main()


def few_runs(path: Path) -> Path:
    """As the published law has them, dense, in its range."""
    runs = [Run(active=n, tokens=d, loss=float(PUBLISHED.loss(n, d, 1)), vocab_size=128_256, name=f"n{n:g}-d{d:g}")
            for n in (3e8, 5e8, 9e8) for d in (1e11, 3e11, 5e11)]  # fmt: skip
    path.write_text(runs_text(runs))
    return path


def test_it_designs_and_says_how_sure_it_is(tmp_path: Path) -> None:
    target = tmp_path / "design.json"
    caps = ("--memory", "5GB", "--train-flops", "5e20", "--token-flops", "1e9")
    done = launch("scaling_law", "design", *caps, "--output", str(target))
    assert done.returncode == 0, done.stderr
    assert "60+1, top 4" in done.stdout and "memory 31.5%" in done.stdout and "no constants for g8+shared" in done.stdout
    found = json.loads(target.read_text())
    config = ModelConfig.from_plain(found["model"])
    assert config == build(config.hidden_size, config.num_layers, 4, 8, Choice(8, True), Rules(), 8192)
    assert found["prediction"]["low"] < found["prediction"]["loss"] < found["prediction"]["high"]


def test_a_design_becomes_a_recipe_that_is_as_long_as_it_says(tmp_path, monkeypatch, capsys):
    target = tmp_path / "recipe.toml"
    call(monkeypatch, "design", "--tokens", "10M", "--memory", "30MB", "--recipe", "quickstart", "--output", str(target),
         "--kv-heads", "1,2", "--context", "64", "--experts", "4")  # fmt: skip
    recipe = load_recipe(str(target), {})
    assert recipe.model.vocab_size == 2048 and recipe.model.moe is not None and recipe.model.max_positions == 256
    assert recipe.pretrain.steps * 8 * 256 == pytest.approx(10e6, rel=1e-3)
    assert "warning: D = 0.01B is outside of the fitted 100B to 500B" in capsys.readouterr().out
    call(monkeypatch, "design", "--tokens", "10M", "--memory", "60MB", "--output", str(tmp_path / "m.toml"))
    assert ModelConfig.from_plain(tomllib.loads((tmp_path / "m.toml").read_text())["model"]).vocab_size == 128_256


def test_runs_are_fitted_and_plotted(tmp_path, monkeypatch, capsys):
    pytest.importorskip("scipy")
    runs, law = few_runs(tmp_path / "runs.jsonl"), tmp_path / "law.json"
    call(monkeypatch, "fit", "--runs", str(runs), "--output", str(law), "--bootstraps", "5", "--prior", "none")
    assert "common, 9 runs" in capsys.readouterr().out
    assert read_law(law).common.constants.c == pytest.approx(1.973, rel=1e-3) and len(read_law(law).common.draws) == 5
    for ending in ("html", "png"):
        call(monkeypatch, "plot", "--law", str(law), "--runs", str(runs), "--output", str(tmp_path / f"p.{ending}"))
    page = Page((tmp_path / "p.html").read_text())
    assert "9 runs" in page.text and "n3e+08-d1e+11" in page.text and not [tag for tag, _ in page.tags if tag == "script"]
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "p.html").read_text().count("<figure") == 3, "a panel for each number of tokens"
    call(monkeypatch, "plot", "--output", str(tmp_path / "published.html"), "--tokens", "100B,6T")
    call(monkeypatch, "fit", "--runs", str(runs), "--output", str(tmp_path / "b.json"), "--bootstraps", "0")
    assert "prior: published" in read_law(tmp_path / "b.json").provenance, "the runs are where the published law was fitted"


@pytest.mark.parametrize(
    "arguments, words",
    [("design --memory 5GB", "give --train-flops F or --tokens D"), ("design --memory 5QB --tokens 1B", "bytes such as 5GB"),
     ("design --tokens 0", "a number above 0"), ("design --tokens 1B --context 0", "context is 0"),
     ("design --tokens 1B --memory 1kB", "smallest that would do"), ("design --tokens 1B --cut x8", "g8"),
     ("design --tokens 1B --law none.json", "none.json cannot be read"), ("design --tokens 1B --output a.txt", "ends in .toml"),
     ("design --tokens 1B --recipe quickstart", "add --output F.toml"), ("design --tokens 1B --vocab 0", "vocab_size is 0"),
     ("design --tokens 1B --experts 0", "whole numbers above 0"), ("design --tokens 6T --inside", "where the law was fitted"),
     ("fit --runs none --output a.json", "none cannot be read"), ("fit --runs . --output .", "exists"),
     ("plot --output a.pdf", "ends in .html or .png"), ("plot --output a.png --runs none", "none cannot be read"),
     ("ladder --hidden 65", "rung d65"), ("ladder --hidden 64,64", "each once"), ("ladder --recipe nothing", "no recipe named"),
     ("ladder --cut g64 --hidden 64", "no multiple of 32"), ("ladder --train.stepz 3", "train.steps"),
     ("ladder --seed -1", "--seed -1"), ("polish", "invalid choice"), ("", "required")],
)  # fmt: skip
def test_what_is_wrong_is_one_line(arguments, words, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=words) as caught:
        call(monkeypatch, *arguments.split())
    assert is_ours(caught.value) and "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_wrong_input_ends_with_status_two_and_one_line() -> None:
    done = launch("scaling_law", "design", "--memory", "50kB", "--train-flops", "5e20")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "4.719e+07 bytes" in done.stderr


def test_amounts_are_read_as_people_write_them() -> None:
    assert (amount("300B"), amount("400k"), amount("5e20"), amount("1.5T")) == (3e11, 4e5, 5e20, 1.5e12)
    assert (size("5GB"), size("1GiB"), size("700kB"), size("12")) == (5e9, 2**30, 7e5, 12)
    assert whole_numbers("1,2") == (1, 2) and names("a, b") == ("a", "b")
    for wrong in ("", "-1", "nan", "1e999", "3X", "1,2"):
        with pytest.raises(InputError, match="expected a number above 0"):
            amount(wrong)


@pytest.fixture
def ladder(tmp_path: Path) -> Ladder:
    stage = StageConfig(data=text_data(tmp_path / "texts"), optim=OptimConfig(lr=3e-3, warmup_steps=2), steps=9, seq_len=32,
                        global_batch=4)  # fmt: skip
    recipe = Recipe(
        name="tiny", model=MODEL, tokenizer=TokenizerConfig(vocab_size=300, train_bytes=20_000), pretrain=stage,
        train=TrainConfig(held_out=(HeldOutConfig(name="texts", sources=("texts",), max_documents=4),)),
        launch=LaunchConfig(threads_per_worker=1), tracking=TrackingConfig(wandb="disabled"),
    )  # fmt: skip
    return Ladder(recipe=recipe, hidden=(64,), experts=(1, 2), tokens=(512, 1024), choices=(Choice(4, True),))


def test_a_ladder_trains_dense_and_mixed_rungs_and_keeps_what_is_done(ladder: Ladder, tmp_path: Path) -> None:
    said: list[str] = []
    runs = climb(ladder, tmp_path / "ladder", said.append)
    assert [run.experts for run in runs].count(2) == 2 and {run.tokens for run in runs} == {512, 1024}
    by = {run.name: run for run in runs}
    dense, mixed = by["d64-t1024"], by["d64-e2-g4-shared-t1024"]
    assert dense.loss < by["d64-t512"].loss < 6 and dense.bits_per_byte > 0
    assert mixed.total > dense.total and mixed.active == pytest.approx(dense.active, rel=0.02)
    assert mixed.choice == Choice(4, True)
    assert dense.active - dense.active_without_embedding == 300 * 64 and read_runs(tmp_path / "ladder") == runs
    recipe = load_recipe(str(tmp_path / "ladder/rungs/d64-t512/recipe.toml"), {})
    assert recipe.pretrain.steps == 4 and not list((tmp_path / "ladder").rglob("*.safetensors"))
    (tmp_path / "ladder/rungs/d64-t512/run.json").write_text("{")
    said.clear()
    assert climb(ladder, tmp_path / "ladder", said.append) == runs, "trained again, the same"
    assert sum("from before" in line for line in said) == 3


def test_a_rung_of_another_recipe_is_refused(ladder: Ladder, tmp_path: Path) -> None:
    small = replace(ladder, experts=(1,), tokens=(128,))
    climb(small, tmp_path / "ladder", str)
    other = replace(small.recipe, pretrain=replace(small.recipe.pretrain, optim=OptimConfig(lr=1e-3)))
    with pytest.raises(InputError, match="another recipe"):
        climb(replace(small, recipe=other), tmp_path / "ladder", str)


def test_a_rung_that_diverges_is_left_out(ladder: Ladder, tmp_path: Path) -> None:
    said: list[str] = []
    wild = replace(ladder.recipe, pretrain=replace(ladder.recipe.pretrain, optim=OptimConfig(lr=1e30)))
    assert climb(replace(ladder, recipe=wild, experts=(1,), tokens=(512,)), tmp_path / "ladder", said.append) == []
    assert "left out" in said[0]


def test_the_ladders_recipe_is_one_of_the_recipes() -> None:
    recipe = load_recipe("scaling_ladder", {})
    assert Ladder(recipe=recipe).rungs()[0].name == "d64-t250000" and list(recipe.stages()) == ["pretrain"]
