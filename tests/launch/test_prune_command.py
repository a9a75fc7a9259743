"""`launch/prune.py` as a user runs it: a run goes in, a checkpoint and a recipe that trains come out."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.commands import recipe_command
from launch.config import load_recipe
from launch.prune import main
from launch.runner import train_stages
from stages.errors import InputError
from tests.helpers.stage_jobs import pretrain_job, run_job
from tests.launch.test_cli import command

SMALL = ["--recipe", "backbone.toml", "--model.num_layers", "1", "--model.ffn_size", "40"]
RECIPE = """
name = "tiny"
[model]
vocab_size = 300
hidden_size = 32
num_layers = 2
num_heads = 2
num_kv_heads = 1
head_dim = 16
ffn_size = 64
max_positions = 64
[tokenizer]
vocab_size = 300
[pretrain]
steps = 2
seq_len = 32
global_batch = 4
[pretrain.optim]
lr = 1e-3
[pretrain.data]
held_out_fraction = 0.1
[[pretrain.data.sources]]
name = "texts"
path = "texts.jsonl"
max_passes = 1e6
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prune")
    run_job(pretrain_job(folder, steps=2))
    (folder / "backbone.toml").write_text(RECIPE)
    return folder


def prune_here(folder: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The command in this process: torch is loaded already."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr("sys.argv", ["prune.py", *arguments])
    main()


def test_prune_then_train(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prune_here(folder, ["--from", "run", *SMALL, "--output", "small", "--distill", "0.5"], monkeypatch)
    recipe = load_recipe("small/recipe.toml", {"launch.runner": "local", "tracking.wandb": "disabled"})
    assert recipe.model.ffn_size == 40 and recipe.pretrain is not None
    assert recipe.pretrain.distill is not None and recipe.pretrain.distill.teacher.endswith("step-000002")
    train_stages(recipe, folder / "went", ["pretrain"], init_from="small", progress=False)
    assert (folder / "went/pretrain/checkpoints/step-000002/commit.json").is_file()


def test_a_trimmed_head_goes_through_the_whole_recipe(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """As `guard_quickstart` is used: prune with --output-tokens, then launch/recipe.py --init-from."""
    prune_here(folder, ["--from", "run", *SMALL, "--output", "guard", "--output-tokens", "20", "--distill", "0.7"], monkeypatch)
    assert "the head keeps 20 of 300 tokens" in capsys.readouterr().err
    recipe = load_recipe("guard/recipe.toml", {})
    assert len(recipe.model.output_tokens) == 20 and not recipe.model.tie_embeddings
    arguments = ["--recipe", "guard/recipe.toml", "--init-from", "guard", "--output-dir", "whole"]
    monkeypatch.setattr("sys.argv", ["recipe.py", *arguments, "--tracking.wandb", "disabled"])
    recipe_command(None)
    from stages.loading import load_model

    loaded = load_model("whole")
    assert loaded.model.head.weight.shape == (20, 32)
    assert loaded.lineage.parent.endswith("guard/checkpoints/step-000000")
    assert (folder / "whole/report.html").is_file() and not (folder / "whole/export/model.pocket").exists()


def test_the_guard_recipes_are_covered_by_their_parents() -> None:
    from launch.recipes import RECIPES
    from modeling.families import FAMILIES
    from modeling.prune import uncovered

    for name, parent in (("guard_quickstart", RECIPES["quickstart"]().model), ("guard_1b", FAMILIES["mobilellm_flash_1_4b"])):
        recipe = RECIPES[name]()
        assert not uncovered(parent, recipe.model)
        assert recipe.model.num_params() < 0.85 * parent.num_params() and list(recipe.stages()) == ["sft", "qat"]


def test_bad_input_is_one_line_and_status_2(folder: Path) -> None:
    done = command("prune", "--from", "run", *SMALL[:2], "--model.ffn_size", "80", "--output", "x", cwd=folder)
    assert done.returncode == 2
    assert "ffn_size 80 is larger" in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert not (folder / "x").exists()


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--from", "nowhere", *SMALL, "--output", "x"], "no such folder"),
        (["--from", "run", *SMALL, "--output", "run"], "exists"),
        (["--from", "run", *SMALL, "--output", "x", "--distill", "2"], "--distill 2"),
        (["--from", "run", *SMALL, "--output", "x", "--output-tokens", "0"], "--output-tokens 0"),
        (["--from", "run", *SMALL, "--output", "x", "--importance", "backbone.toml"], "no importance of ours"),
        (["--from", "run", *SMALL, "--output", "x", "--calibration-sequences", "0"], "sequences=0"),
        (["--from", "run", *SMALL, "--output", "x", "--output-dir", "y"], "--output-dir"),
    ],
)
def test_what_makes_no_sense_is_refused(
    folder: Path, arguments: list[str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match=words):
        prune_here(folder, arguments, monkeypatch)
    assert not (folder / "x").exists()
