"""The four stages after one another, on made-up text: what each takes from the one before and what it leaves."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from data_pipeline.config import HeldOutConfig
from data_pipeline.errors import DataError
from data_pipeline.held_out import held_out_texts
from quant.apply import prepare
from quant.spec import QuantSpec
from stages.checkpoint import read_document
from stages.config import DistillConfig
from stages.distributed import Process
from stages.errors import CheckpointError, InputError
from stages.evaluate import perplexity
from stages.loading import load_model
from stages.run import run_stages
from stages.scoring import Scorer, decoder_nll
from tests.helpers.stage_jobs import change, chat_data, losses, pretrain_job, read_metrics, run_job


def recipe(folder):
    """Pre-train, mid-train at twice the context, SFT, QAT; held-out texts and chats scored around each."""
    first = pretrain_job(folder, steps=30, log_every=10, lr=1e-2)
    chats = chat_data(folder)
    sets = (
        (HeldOutConfig(name="texts", sources=("texts",), max_documents=4), first.config.data.sources),
        (HeldOutConfig(name="chats", kind="chat", sources=("chats",), max_documents=8), chats.sources),
    )
    first = replace(first, held_out=sets)
    run = first.output_dir
    middle = change(
        first, stage="midtrain", init_from=f"{run}/pretrain", rope_theta=40_000.0, max_positions=128, seq_len=128,
        global_batch=2, steps=10, schedule="linear", distill=DistillConfig(teacher="init", weight=0.3),
    )  # fmt: skip
    tuned = change(first, stage="sft", init_from=f"{run}/midtrain", data=chats, seq_len=64, steps=30)
    aware = change(tuned, stage="qat", init_from=f"{run}/sft", quant=QuantSpec(group_size=16), lr=1e-3, steps=15,
                   distill=DistillConfig(teacher="init"))  # fmt: skip
    return [first, middle, tuned, aware]


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    jobs = recipe(tmp_path_factory.mktemp("four"))
    return jobs, run_stages(jobs, Process())


def _scores(job):
    return json.loads((job.folder / "evaluation.json").read_text())


def test_every_stage_ends_with_a_checkpoint_and_names_its_parent(done):
    jobs, results = done
    for job, result in zip(jobs, results, strict=True):
        assert result.checkpoint.name == f"step-{job.config.steps:06d}"
    lineage = [read_document(result.checkpoint, "lineage") for result in results]
    assert [entry["parent"] for entry in lineage] == [None, *(str(result.checkpoint) for result in results[:-1])]
    counted = [job.config.steps * job.config.global_batch * job.config.seq_len for job in jobs]
    assert [entry["tokens_seen"] for entry in lineage] == [sum(counted[: i + 1]) for i in range(4)]


def test_the_longer_context_stays_with_the_later_stages(done):
    _, results = done
    models = [read_document(result.checkpoint, "model") for result in results]
    assert [(model["max_positions"], model["rope_theta"]) for model in models] == [(64, 1e4)] + [(128, 4e4)] * 3
    assert [model["quant"] is not None for model in models] == [False, False, False, True]


def test_each_stage_gains_what_it_is_for(done):
    pretrain, sft = _scores(done[0][0]), _scores(done[0][2])
    assert pretrain["after"]["texts"]["bits_per_byte"] < 0.8 * pretrain["before"]["texts"]["bits_per_byte"]
    assert sft["after"]["chats"]["loss"] < 0.9 * sft["before"]["chats"]["loss"]
    assert set(sft["after"]["chats"]) == {"loss", "n_tokens"}


def test_qat_starts_from_round_to_nearest_and_comes_nearer_to_its_teacher(done):
    jobs, results = done
    tuned = load_model(results[2].checkpoint)
    prepare(tuned.model, jobs[3].config.quant)
    scorer = Scorer(token_nll=decoder_nll(tuned.model), tokenizer=tuned.tokenizer, context=128)
    texts = held_out_texts(jobs[0].config.data.sources, 4, jobs[0].held_out_fraction)
    before = _scores(jobs[3])["before"]["texts"]
    assert perplexity(scorer, texts)["loss"] == pytest.approx(before["loss"], rel=1e-5)
    assert before["loss"] != pytest.approx(_scores(jobs[2])["after"]["texts"]["loss"], rel=1e-4)
    assert losses(jobs[3])[-1] < 0.7 * losses(jobs[3])[0]  # the KL divergence to the SFT model


def test_a_finished_recipe_is_skipped_whole(done):
    jobs, results = done
    assert [result.skipped for result in run_stages(jobs, Process())] == [True] * 4
    assert [result.checkpoint for result in run_stages(jobs, Process())] == [result.checkpoint for result in results]


def test_evaluation_in_between_is_kept_by_step_and_disturbs_nothing(done, tmp_path):
    job = replace(done[0][2], output_dir=str(tmp_path / "run"))
    watched = change(job, eval_every=10, log_every=1)
    run_job(watched)
    assert set(_scores(watched)["steps"]) == {"10", "20"}
    plain = {row["step"]: row["loss"] for row in read_metrics(done[0][2])}
    assert {row["step"]: row["loss"] for row in read_metrics(watched) if row["step"] in plain} == plain


def test_a_teacher_with_another_tokenizer_is_refused(done, tmp_path):
    from tests.helpers.stage_jobs import write_texts

    write_texts(tmp_path / "texts.jsonl", seed=7, count=50)
    other = pretrain_job(tmp_path, steps=1)
    run_job(other)
    job = change(done[0][1], output_dir=str(tmp_path / "student"), distill=DistillConfig(teacher=other.output_dir))
    with pytest.raises(InputError, match=r"midtrain.distill.teacher=.* has another tokenizer"):
        run_job(job)


def test_a_tokenizer_that_is_not_the_checkpoints_is_refused(done, tmp_path):
    from tests.helpers.stage_jobs import write_texts

    write_texts(tmp_path / "texts.jsonl", seed=9, count=50)
    other = run_job(pretrain_job(tmp_path, steps=1)).checkpoint
    tokenizer = replace(done[0][2].tokenizer, path=str(other / "tokenizer.json"))
    with pytest.raises(CheckpointError, match="is not the one that .* was trained with"):
        run_job(replace(done[0][2], tokenizer=tokenizer, output_dir=str(tmp_path / "student")))


@pytest.mark.parametrize(
    ("stage", "changes", "message"),
    [
        (0, dict(quant=QuantSpec()), "pretrain.quant is set, but only the qat stage quantizes"),
        (0, dict(distill=DistillConfig(teacher="init")), "pretrain.distill.teacher=init needs a model to start from"),
        (3, dict(quant=None), "qat.quant is not set"),
    ],
)
def test_stages_refuse_what_makes_no_sense_for_them(done, tmp_path, stage, changes, message):
    with pytest.raises(InputError, match=message):
        run_job(change(done[0][stage], output_dir=str(tmp_path), **changes))


def test_sft_wants_conversations(done, tmp_path):
    with pytest.raises(InputError, match="sft.data.kind=text"):
        run_job(change(done[0][2], output_dir=str(tmp_path), data=done[0][0].config.data))


def test_too_many_passes_over_a_source_are_refused_before_training(tmp_path):
    job = pretrain_job(tmp_path, steps=500)
    once = tuple(replace(source, max_passes=1.0) for source in job.config.data.sources)
    with pytest.raises(DataError, match="more than max_passes=1"):
        run_job(change(job, data=replace(job.config.data, sources=once)))
