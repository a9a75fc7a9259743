"""The whole path as a user runs it: four stages, export, evaluation, report; then resume."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from tests.helpers.commands import launch, rows, torchrun

STAGES = ("pretrain", "midtrain", "sft", "qat")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("smoke") / "run"
    done = launch("recipe", "--recipe", "smoke", "--output-dir", str(directory))
    assert done.returncode == 0, done.stderr
    return directory


def test_a_run_directory_holds_what_the_contract_says(run: Path) -> None:
    for name in ("recipe.toml", "lineage.json", "report.html", "samples.json", "export/evaluation.json"):
        assert (run / name).is_file(), name
    for stage in STAGES:
        assert [path.name for path in (run / stage / "checkpoints").glob("step-??????")] == ["step-000004"]
        assert (run / stage / "wandb").is_dir()
    assert (run / "export" / "hf" / "config.json").is_file()


@pytest.mark.parametrize("stage", STAGES)
def test_metrics_hold_the_contract_keys_once_a_step(run: Path, stage: str) -> None:
    found = rows(run / stage)
    assert [row["step"] for row in found] == [1, 2, 3, 4]
    for row in found:
        assert row["stage"] == stage
        assert {"tokens", "loss", "lr", "grad_norm", "tokens_per_second", "step_seconds"} <= set(row)
        assert math.isfinite(row["loss"])


def test_lineage_names_each_parent(run: Path) -> None:
    chain = json.loads((run / "lineage.json").read_text())["stages"]
    assert [entry["stage"] for entry in chain] == list(STAGES)
    assert chain[0]["parent"] is None
    for parent, child in zip(chain, chain[1:], strict=False):
        assert parent["checkpoint"] in child["parent"]


def test_a_finished_run_resumes_without_training_again(run: Path) -> None:
    before = {stage: (run / stage / "metrics.jsonl").read_bytes() for stage in STAGES}
    done = launch("recipe", "--recipe", "smoke", "--output-dir", str(run), "--resume")
    assert done.returncode == 0, done.stderr
    assert before == {stage: (run / stage / "metrics.jsonl").read_bytes() for stage in STAGES}


def test_the_saved_recipe_runs_again_as_it_is(run: Path, tmp_path: Path) -> None:
    done = launch("pretrain", "--recipe", str(run / "recipe.toml"), "--output-dir", str(tmp_path / "again"))
    assert done.returncode == 0, done.stderr
    losses = [[row["loss"] for row in rows(folder / "pretrain")] for folder in (run, tmp_path / "again")]
    assert losses[0] == losses[1]


def test_the_export_loads_in_transformers_with_the_models_logits(run: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from stages.loading import load_model

    loaded = load_model(run / "sft")
    target = run / "sft-hf"
    done = launch("export", "--checkpoint", str(run / "sft"), "--to", "hf", "--output", str(target))
    assert done.returncode == 0, done.stderr
    model, tokenizer = AutoModelForCausalLM.from_pretrained(target), AutoTokenizer.from_pretrained(target)
    ids = loaded.tokenizer.encode("def function(argument):")
    assert tokenizer("def function(argument):", add_special_tokens=False)["input_ids"] == ids
    tokens = torch.tensor([ids])
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(tokens), model(tokens).logits.float(), atol=1e-4, rtol=0)


def test_evaluate_and_generate_take_a_run_directory(run: Path, tmp_path: Path) -> None:
    items = tmp_path / "tiny.jsonl"
    items.write_text(json.dumps({"id": "1", "context": "", "question": "Two and two?", "choices": ["four", "a horse"],
                                 "answer_index": 0}) + "\n")
    text = tmp_path / "plain.txt"
    text.write_text("The function returns a list of names.")
    output = tmp_path / "scores.json"
    done = launch("evaluate", "--model", str(run), "--tasks", f"{items},{text}", "--output", str(output))
    assert done.returncode == 0, done.stderr
    scores = json.loads(output.read_text())
    assert scores["tiny"]["n"] == 1 and {"acc", "acc_norm"} <= set(scores["tiny"])
    assert {"word_perplexity", "bits_per_byte"} <= set(scores["plain"])
    done = launch("generate", "--model", str(run), "--prompt", "def main", "--max-new-tokens", "5")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_a_checkpoint_of_another_model_is_refused(run: Path, tmp_path: Path) -> None:
    done = launch("sft", "--recipe", "smoke", "--init-from", str(run / "pretrain"), "--model.num_layers", "3",
                  "--output-dir", str(tmp_path / "x"))
    assert done.returncode == 2
    assert "num_layers" in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_a_nan_loss_ends_the_run_with_one_line_and_status_1(tmp_path: Path) -> None:
    done = launch("pretrain", "--recipe", "smoke", "--output-dir", str(tmp_path / "x"), "--pretrain.optim.lr", "1e38",
                  "--pretrain.optim.clip_norm", "0", "--pretrain.optim.warmup_steps", "0")
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1 and done.stderr.startswith("error: ")


def test_torchrun_trains_on_two_processes_and_writes_one_run(tmp_path: Path) -> None:
    done = torchrun("--recipe", "smoke", "--launch.workers", "2", "--train.held_out", "[]",
                    "--output-dir", str(tmp_path / "run"))  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [row["step"] for row in rows(tmp_path / "run" / "pretrain")] == [1, 2, 3, 4]
    state = json.loads((tmp_path / "run" / "pretrain" / "checkpoints" / "step-000004" / "state.json").read_text())
    assert state["world"] == 2
    assert (tmp_path / "run" / "report.html").is_file()


ONE_STEP = ["--recipe", "smoke", "--train.steps", "1", "--train.held_out", "[]", "--tracking.wandb", "disabled",
            "--evaluation.prompts", '["The"]']


def test_a_model_that_no_layout_holds_is_finished_without_the_export(tmp_path: Path) -> None:
    run, shape = tmp_path / "run", ["--model.attention", '["window", "full"]']
    done = launch("recipe", *ONE_STEP, *shape, "--stages", "pretrain", "--output-dir", str(run))
    assert done.returncode == 0, done.stderr
    warnings = [line for line in done.stderr.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 1 and "window" in warnings[0]
    for name in ("lineage.json", "report.html", "samples.json", "export/evaluation.json"):
        assert (run / name).is_file(), name
    assert not (run / "export" / "hf").exists()
    assert "export/hf was left out" in (run / "report.html").read_text()


def test_a_chosen_stage_starts_from_the_finished_one_before_it(tmp_path: Path) -> None:
    run = tmp_path / "run"
    alone = launch("recipe", *ONE_STEP, "--stages", "midtrain", "--output-dir", str(run))
    assert alone.returncode == 2 and "pretrain at step 0 of 1" in alone.stderr
    assert len(alone.stderr.strip().splitlines()) == 1 and "--init-from" not in alone.stderr
    assert not run.exists()
    first = launch("pretrain", *ONE_STEP, "--output-dir", str(run))
    assert first.returncode == 0, first.stderr
    done = launch("recipe", *ONE_STEP, "--resume", "--stages", "midtrain", "--output-dir", str(run))
    assert done.returncode == 0, done.stderr
    chain = json.loads((run / "lineage.json").read_text())["stages"]
    assert [entry["stage"] for entry in chain] == ["pretrain", "midtrain"]
    assert chain[0]["checkpoint"] in chain[1]["parent"]
    assert {row["stage"] for row in json.loads((run / "samples.json").read_text())} == {"pretrain", "midtrain"}
