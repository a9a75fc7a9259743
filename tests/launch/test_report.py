"""report.html of a synthetic run directory: what it says, what it refuses to say, and that nothing gets out or in."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.config import DataConfig, HeldOutConfig, SourceConfig
from launch.config import Recipe, save_toml
from launch.report import write_report
from launch.report_data import read_run
from launch.report_verdicts import four_comparisons
from modeling.config import ModelConfig
from quant.spec import QuantSpec
from stages.config import STAGES, DistillConfig, OptimConfig, StageConfig, TrainConfig
from stages.errors import InputError
from tests.helpers.page import Page

MODEL = ModelConfig(vocab_size=512, hidden_size=64, num_layers=3, num_heads=4, num_kv_heads=2, ffn_size=192)
HOSTILE = "<script>alert('x')</script><img src=\"http://evil.example/x.png\"> & \x00\u202e done"
BITS = {"books": (8.1, 3.0, 3.1), "maths": (8.3, 3.6, 2.4)}  # untrained, after pretrain, after midtrain
CHAT = {"pretrain": (6.2, 4.0), "midtrain": (4.0, 3.6), "sft": (3.6, 2.0), "qat": (2.31, 2.04)}


def make_recipe() -> Recipe:
    books, maths, chats = (SourceConfig(name=name, path=f"{name}.txt", weight=w) for name, w in
                           (("books", 1.0), ("maths", 3.0), ("chats", 1.0)))  # fmt: skip

    def stage(*sources: SourceConfig, kind: Any = "text", **more: Any) -> StageConfig:
        data = DataConfig(sources=sources, kind=kind)
        return StageConfig(data=data, optim=OptimConfig(lr=1e-3), steps=100, seq_len=64, global_batch=8, **more)

    return Recipe(
        name="synthetic",
        model=MODEL,
        pretrain=stage(books),
        midtrain=stage(books, maths),
        sft=stage(chats, kind="chat"),
        qat=stage(chats, kind="chat", quant=QuantSpec(), distill=DistillConfig(teacher="init")),
        train=TrainConfig(held_out=(
            HeldOutConfig(name="books", sources=("books",)),
            HeldOutConfig(name="maths", sources=("maths",)),
            HeldOutConfig(name="chats", kind="chat", sources=("chats",)),
        )),
    )  # fmt: skip


def make_run(directory: Path) -> Path:
    """A finished run of 100 steps a stage, logged every two."""
    directory.mkdir()
    save_toml(make_recipe(), directory / "recipe.toml")
    for place, stage in enumerate(STAGES):
        _write_metrics(directory / stage, stage, start=6.0 - 1.2 * place)
        _write_json(directory / stage / "evaluation.json", _evaluation(stage))
        checkpoint = directory / stage / "checkpoints" / "step-000100"
        parent = f"{STAGES[place - 1]}/checkpoints/step-000100" if place else None
        _write_json(checkpoint / "lineage.json", {
            "parent": parent, "recipe_hash": "abcdef012345", "data_fingerprint": "f" * 64, "stage": stage, "step": 100,
            "tokens_seen": 51_200 * (place + 1), "revision": "0123abc",
        })  # fmt: skip
        _write_json(checkpoint / "model.json", {**dataclasses.asdict(MODEL), "quant": None})
        _write_json(checkpoint / "commit.json", {"files": {}})
    _write_json(directory / "export" / "evaluation.json", {
        "arc_easy": {"acc": 0.31, "acc_norm": 0.29, "n": 200},
        "wikitext": {"bits_per_byte": 2.2, "word_perplexity": 3210.5, "n": 40},
    })  # fmt: skip
    _write_json(directory / "samples.json", [
        {"stage": stage, "prompt": prompt, "text": f"{HOSTILE} from {stage}"}
        for stage in reversed(STAGES) for prompt in ("Once upon a time", "user: What is two plus two?")
    ])  # fmt: skip
    return directory


def _evaluation(stage: str) -> dict[str, Any]:
    place = min(STAGES.index(stage), 2)  # SFT and QAT leave the text sets as mid-training left them
    before = {name: {"bits_per_byte": bits[place], "loss": bits[place], "n": 9} for name, bits in BITS.items()}
    after = {name: {"bits_per_byte": bits[min(place + 1, 2)], "loss": 1.0, "n": 9} for name, bits in BITS.items()}
    for table, loss in zip((before, after), CHAT[stage], strict=True):
        table["chats"] = {"loss": loss, "n_tokens": 900}
    return {"before": before, "after": after}


def _write_metrics(folder: Path, stage: str, start: float) -> None:
    folder.mkdir(parents=True)
    same = {"tokens_per_second": 5120.0, "step_seconds": 0.1, "data_seconds": 0.0002}
    lines = [
        {"stage": stage, "step": step, "tokens": step * 512, "lr": 1e-3 * (1 - step / 100), "grad_norm": 1 + 5 / step,
         "loss": start * math.exp(-step / 70) + 0.1 * math.sin(step), **same}
        for step in range(2, 101, 2)
    ]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def _write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def edit_json(path: Path, *keys: str, value: float) -> None:
    whole = json.loads(path.read_text())
    node = whole
    for key in keys[:-1]:
        node = node[key]
    node[keys[-1]] = value
    path.write_text(json.dumps(whole))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "night-run")


def verdicts(run: Path) -> list[str]:
    return [comparison.verdict for comparison in four_comparisons(read_run(run))]


def page_of(run: Path) -> Page:
    return Page(write_report(run).read_text(encoding="utf-8"))


def test_a_finished_run_holds_all_four_comparisons_and_shows_their_numbers(run: Path) -> None:
    assert verdicts(run) == ["held"] * 4
    page = page_of(run)
    for number in ("8.1000", "3.0000", "3.6000", "2.4000", "2.0000", "2.3100", "2.0400"):
        assert number in page.text
    assert page.text.count("✓ held") == 4


def test_the_midtraining_comparison_is_about_the_sources_that_grew_only(run: Path) -> None:
    pretraining, midtraining, _, _ = four_comparisons(read_run(run))
    assert [row.held_out for row in pretraining.rows] == ["books"]
    assert [row.held_out for row in midtraining.rows] == ["maths"]  # books got worse in mid-training, as replay may


@pytest.mark.parametrize(
    ("index", "stage", "held_out", "metric", "value"),
    [
        (0, "pretrain", "books", "bits_per_byte", 8.1),
        (1, "midtrain", "maths", "bits_per_byte", 3.7),
        (2, "sft", "chats", "loss", 3.61),
        (3, "qat", "chats", "loss", 2.32),
        (3, "qat", "chats", "loss", 1.5),  # below SFT's, but further from it than rounding is
        (0, "pretrain", "books", "bits_per_byte", math.nan),
    ],
)
def test_a_comparison_that_the_numbers_contradict_did_not_hold(
    run: Path, index: int, stage: str, held_out: str, metric: str, value: float
) -> None:
    edit_json(run / stage / "evaluation.json", "after", held_out, metric, value=value)
    assert verdicts(run)[index] == "did not hold"
    assert "✗ did not hold" in page_of(run).text


def test_a_number_that_is_missing_gives_no_verdict_and_says_which(run: Path) -> None:
    (run / "sft" / "evaluation.json").unlink()
    assert verdicts(run) == ["held", "held", "not measured", "not measured"]
    text = page_of(run).text
    assert "sft/evaluation.json has no loss of 'chats' before the stage." in text
    assert "sft/evaluation.json (after) has no loss of 'chats'." in text


def test_a_set_that_mixes_in_other_sources_is_left_out_where_a_pure_one_exists(run: Path) -> None:
    recipe = make_recipe()
    mixed = HeldOutConfig(name="mixed", sources=("books", "maths"))
    both = dataclasses.replace(recipe.train, held_out=(mixed, *recipe.train.held_out))
    alone = dataclasses.replace(recipe.train, held_out=(mixed,))
    for train, expected in ((both, ["books"]), (alone, [])):
        save_toml(dataclasses.replace(recipe, train=train), run / "recipe.toml")
        assert [row.held_out for row in four_comparisons(read_run(run))[0].rows] == expected
    assert verdicts(run)[0] == "not measured"  # the mixed set is what there is, and it was not scored


def test_one_missing_set_withholds_the_verdict_of_the_whole_comparison(run: Path) -> None:
    recipe = make_recipe()
    second = HeldOutConfig(name="more books", sources=("books",))
    more = dataclasses.replace(recipe.train, held_out=(*recipe.train.held_out, second))
    save_toml(dataclasses.replace(recipe, train=more), run / "recipe.toml")
    assert verdicts(run)[0] == "not measured"


def test_the_page_fetches_nothing_and_stays_small(run: Path) -> None:
    path = write_report(run)
    page = page_of(run)
    assert path.stat().st_size < 400_000
    assert not {tag for tag, _ in page.tags} & {"script", "img", "link", "iframe", "object", "image", "base"}
    for _, attributes in page.tags:
        for key in ("src", "href", "xlink:href", "srcset", "data", "action"):
            assert (attributes.get(key) or "#").startswith("#"), attributes
    style = re.sub(r"url\(#[^)]*\)", "", path.read_text())
    assert "url(" not in style and "@import" not in style
    policy = next(attributes for tag, attributes in page.tags if attributes.get("http-equiv"))
    assert (policy["content"] or "").startswith("default-src 'none'")


def test_generated_text_is_shown_as_text_and_not_obeyed(run: Path) -> None:
    raw = write_report(run).read_text(encoding="utf-8")
    assert "<script" not in raw and "\x00" not in raw and "\u202e" not in raw
    assert raw.count("&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;") == 8


def test_text_that_is_no_unicode_does_not_stop_the_report(run: Path) -> None:
    (run / "samples.json").write_text('[{"stage": "sft", "prompt": "p", "text": "half \\ud83d a pair"}, {"stage": 3}]')
    text = page_of(run).text
    assert "half ? a pair" in text
    assert "samples.json has 1 entries without stage, prompt and text" in text


def test_all_four_stages_have_a_loss_curve_in_their_own_colour(run: Path) -> None:
    raw = write_report(run).read_text(encoding="utf-8")
    assert raw.count("<svg") == raw.count("</svg>") == 4 + 3
    for stage in STAGES:
        assert f"stroke: var(--{stage})" in raw
    assert not re.search(r"#0[1-7]0[1-7]0[1-7]", raw), "a stand-in colour was left in"
    ids = re.findall(r'\bid="([^"]+)"', raw)
    assert len(ids) == len(set(ids))


def test_samples_of_a_prompt_follow_the_order_of_training(run: Path) -> None:
    text = page_of(run).text
    places = [text.index(f"from {stage}") for stage in STAGES]
    assert places == sorted(places)


def test_an_uncommitted_checkpoint_does_not_exist(run: Path) -> None:
    newer = run / "qat" / "checkpoints" / "step-000200"
    _write_json(newer / "lineage.json", {"step": 200, "recipe_hash": "half-written"})
    assert "half-written" not in page_of(run).text


def test_a_step_that_was_logged_twice_counts_once_and_a_cut_line_is_noted(run: Path) -> None:
    before = read_run(run).stages["pretrain"]
    path = run / "pretrain" / "metrics.jsonl"
    again = json.dumps(before.metrics[-1] | {"loss": 99.0})
    path.write_text(path.read_text() + again + "\n" + again[: len(again) // 2])
    record = read_run(run)
    after = record.stages["pretrain"]
    assert [line["step"] for line in after.metrics] == [line["step"] for line in before.metrics]
    assert after.metrics[-1]["loss"] == 99.0
    assert after.training_seconds == pytest.approx(10.0)
    assert after.data_wait_share == pytest.approx(0.002)
    assert record.notes == ["pretrain/metrics.jsonl has 1 line(s) that are not JSON; they are left out."]


def test_a_run_of_one_stage_says_what_is_not_there(run: Path) -> None:
    for stage in STAGES[1:]:
        shutil.rmtree(run / stage)
    shutil.rmtree(run / "export")
    (run / "samples.json").unlink()
    text = page_of(run).text
    assert verdicts(run) == ["held", "not measured", "not measured", "not measured"]
    assert "The midtrain stage has not been run in this directory." in text
    assert "without logged steps here: Mid-training, SFT, QAT." in text
    assert "No tasks were scored" in text and "No samples" in text


def test_an_empty_directory_and_broken_files_still_give_a_page(tmp_path: Path) -> None:
    text = page_of(tmp_path).text
    assert "recipe.toml is missing" in text and "No stage has written metrics here." in text
    broken = make_run(tmp_path / "broken")
    (broken / "recipe.toml").write_text("nonsense = 1\n")
    (broken / "samples.json").write_text("{")
    (broken / "export" / "evaluation.json").write_text("[1, 2]")
    text = page_of(broken).text
    assert "recipe.toml does not fit this version" in text and "samples.json cannot be read" in text
    assert verdicts(broken) == ["not measured"] * 4


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected a run directory"):
        write_report(tmp_path / "nowhere")


def test_a_mixture_shows_how_evenly_its_experts_were_used_and_a_dense_model_nothing_of_it(run: Path) -> None:
    assert "busiest expert" not in page_of(run).text
    moe = {"num_experts": 6, "top_k": 2, "expert_size": 24, "shared_size": 48}
    for document in run.glob("*/checkpoints/*/model.json"):
        _write_json(document, {**dataclasses.asdict(MODEL), "moe": moe, "quant": None})
    path = run / "sft" / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        line["moe"] = {"load_max": [1.25, 1.75], "load_min": [0.5, 0.25], "dropped": [0.0, 0.5], "load": [[1.0], [1.0]]}
    lines[-1]["moe"] = {"load_max": ["much"], "load_min": [], "dropped": None}  # somebody else's line
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = read_run(run).stages["sft"].metrics
    assert [found[0][f"experts_{name}"] for name in ("load_max", "load_min", "dropped")] == [1.75, 0.25, 0.25]
    assert not any(name.startswith("experts") for name in found[-1])
    text = page_of(run).text
    assert "6 experts of 24, 2 a token, one of 48 for every token" in text and "busiest expert" in text
