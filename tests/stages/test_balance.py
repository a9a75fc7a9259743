"""Training a mixture: biases move by load, router losses reach the router, what is logged is what happened."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from modeling.decoder import Decoder
from modeling.init import init_weights
from modeling.moe import RoutingRecord
from modeling.moe_config import MoEConfig
from stages.balance import ExpertBalance, moe_layers, router_loss, wandb_row
from stages.checkpoint import load_full, tensor_names
from stages.config import MoETrainConfig
from stages.distributed import Process
from stages.errors import NonFiniteError
from stages.loading import load_model
from stages.objectives import TrainableModel, linear_cross_entropy
from tests.helpers.stage_jobs import MODEL, change, losses, pretrain_job, read_metrics, run_job

MOE = MoEConfig(num_experts=6, top_k=2, expert_size=24, shared_size=32)
TINY = replace(MODEL, moe=MOE)
LABELS = torch.tensor([[5, 7, 9, 11], [2, -100, 4, -100]])
IDS = torch.tensor([[3, 5, 7, 9], [8, 2, 6, 4]])


def build(seed: int = 0) -> Decoder:
    model = Decoder(replace(TINY, init_std=0.2))
    init_weights(model, seed)
    return model


def test_a_bias_rises_where_the_load_is_below_the_mean_and_falls_where_it_is_above() -> None:
    model = build()
    balance = ExpertBalance(model, MoETrainConfig(bias_rate=0.25), Process())
    record = RoutingRecord()
    model.hidden(IDS, record=record)
    balance.watch(record)
    balance.watch(record)  # two micro-batches
    balance.step()
    for layer, noted in zip(moe_layers(model), record.layers, strict=True):
        load = noted.load.double() * 2
        assert torch.equal(layer.router.bias, (0.25 * torch.sign(load.mean() - load)).float())
        assert load.sum() == 2 * 8 * 2 and layer.router.bias.any()
    balance.step()  # nothing seen: no expert is above the mean
    assert all(layer.router.bias.abs().max() <= 0.25 for layer in moe_layers(model))


@pytest.mark.parametrize("balance", ["loss", "none"])
def test_without_bias_balancing_the_biases_rest(balance: str) -> None:
    model = build()
    watch = ExpertBalance(model, MoETrainConfig(balance=balance), Process())  # type: ignore[arg-type]
    record = RoutingRecord()
    model.hidden(IDS, record=record)
    watch.watch(record)
    watch.step()
    assert not any(layer.router.bias.any() for layer in moe_layers(model))


@pytest.mark.parametrize("balance", ["bias", "loss"])
def test_the_router_losses_add_their_gradient_and_not_their_value(balance: str) -> None:
    model, config = build(), MoETrainConfig(balance=balance, z_weight=0.5, balance_weight=0.25)  # type: ignore[arg-type]
    module = TrainableModel(model, None, config)
    got = module(IDS, None, LABELS)
    grads = torch.autograd.grad(got, list(model.parameters()))

    record = RoutingRecord(balance_loss=balance == "loss")
    hidden, weight = model.head_operands(model.hidden(IDS, record=record))
    plain = linear_cross_entropy(hidden, weight, LABELS)
    supervised = LABELS != -100
    extra = sum(0.5 * layer.z[supervised].sum() for layer in record.layers)
    if balance == "loss":
        extra = extra + sum(0.25 * (4 * layer.balance[0] + 2 * layer.balance[1]) for layer in record.layers)  # type: ignore[index]
    torch.testing.assert_close(got, plain)
    torch.testing.assert_close(router_loss(record, config, supervised), extra)
    wanted = torch.autograd.grad(plain + extra, list(model.parameters()))
    for mine, theirs in zip(grads, wanted, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_scoring_drops_nothing_and_moves_nothing() -> None:
    model = build()
    module = TrainableModel(model, None, MoETrainConfig(dispatch="capacity", capacity_factor=0.1))
    scored = module(IDS, None, LABELS, reduction="none")
    assert module.record is None
    torch.testing.assert_close(scored.sum(), TrainableModel(model)(IDS, None, LABELS))
    assert not torch.isclose(scored.sum(), module(IDS, None, LABELS))


def test_a_run_logs_its_experts_a_layer_and_its_checkpoint_holds_the_biases(tmp_path: Path) -> None:
    job = pretrain_job(tmp_path, model=TINY, steps=8, moe=MoETrainConfig(dispatch="capacity", capacity_factor=1.0))
    result = run_job(job)
    rows = read_metrics(job)
    for row in rows:
        said = row["moe"]
        assert {len(values) for values in said.values()} == {2}
        for load, largest, smallest in zip(said["load"], said["load_max"], said["load_min"], strict=True):
            assert len(load) == 6 and sum(load) == pytest.approx(6, abs=1e-3)
            assert (max(load), min(load)) == (largest, smallest)
        assert all(0 < rate < 1 for rate in said["dropped"]) and all(0 < nats < 1.8 for nats in said["entropy"])
    assert losses(job)[-1] < losses(job)[0]
    biases = [name for name in tensor_names(result.checkpoint) if name.endswith("router.bias")]
    assert biases == [f"model.blocks.{i}.feed_forward.router.bias" for i in range(2)]
    state = load_full(result.checkpoint)
    # Eight steps of 1e-3 up or down: each bias is an even multiple of it, or none where a load met the mean.
    for name in biases:
        steps = state[name.removeprefix("model.")] / 1e-3
        assert steps.abs().max() <= 8.001 and steps.any()
        torch.testing.assert_close(steps, steps.round(), atol=1e-3, rtol=0)
    loaded = load_model(result.checkpoint).model
    assert torch.equal(next(moe_layers(loaded)).router.bias, state["blocks.0.feed_forward.router.bias"])


def test_stopped_and_resumed_a_mixture_goes_on_bit_for_bit(tmp_path: Path) -> None:
    whole = pretrain_job(tmp_path, model=TINY, steps=6, output_dir=str(tmp_path / "whole"))
    run_job(whole)
    part = change(whole, output_dir=str(tmp_path / "part"))
    run_job(change(part, steps=3, schedule="constant"))
    again = change(whole, output_dir=str(tmp_path / "again"), schedule="constant")
    run_job(again)
    run_job(change(part, schedule="constant"))
    assert losses(part) == losses(again)
    rows = [[row["moe"] for row in read_metrics(job)] for job in (part, again)]
    assert rows[0] == rows[1]


def test_a_router_that_says_nan_ends_the_run_before_a_step_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from modeling import moe

    monkeypatch.setattr(moe.F, "linear", lambda x, w: torch.full((len(x), len(w)), float("nan")))
    with pytest.raises(NonFiniteError, match="pretrain step 1: loss nan"):
        run_job(pretrain_job(tmp_path, model=TINY))


def test_a_checkpoint_with_fewer_experts_is_refused(tmp_path: Path) -> None:
    first = pretrain_job(tmp_path, model=TINY, steps=1)
    run_job(first)
    other = change(first, stage="midtrain", init_from=f"{first.output_dir}/pretrain",
                   model=replace(TINY, moe=replace(MOE, num_experts=8)))  # fmt: skip
    with pytest.raises(Exception, match="another model: model.moe.num_experts=6, the recipe has 8"):
        run_job(other)


def test_wandb_gets_a_series_a_layer_and_histograms() -> None:
    flat = wandb_row({"step": 3, "moe": {"load_max": [1.5, 2.0], "load": [[0.5, 1.5], [1.0, 1.0]]}})
    assert flat["step"] == 3 and flat["moe/load_max/01"] == 2.0 and set(flat) >= {"moe/load/00", "moe/load/01"}

    class Recorder:
        Histogram = staticmethod(tuple)

    assert flat["moe/load/00"](Recorder) == (0.5, 1.5)
