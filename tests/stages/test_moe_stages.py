"""A mixture through all four stages, into a packed file, and out of the runtime again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from kernels.runtime import PackedModel
from modeling.generate import generate
from modeling.moe_config import MoEConfig
from quant.primitives import QuantError
from quant.spec import QuantSpec
from stages.config import DistillConfig, MoETrainConfig
from stages.distributed import Process
from stages.export_packed import export_packed
from stages.loading import load_model
from stages.packed import generate_packed, load_packed
from stages.run import run_stages
from tests.helpers.stage_jobs import MODEL, change, chat_data, pretrain_job, read_metrics, run_job

MOE = MoEConfig(num_experts=12, top_k=3, expert_size=32, shared_size=64, route_scale=2.5)
TINY = replace(MODEL, hidden_size=64, head_dim=32, ffn_size=160, qk_norm=True, moe=MOE)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("moe")
    first = pretrain_job(folder, model=TINY, steps=12, lr=1e-2, moe=MoETrainConfig(dispatch="capacity", bias_rate=0.02))
    run_job(first)
    path = Path(first.output_dir)
    later = {"moe": MoETrainConfig(bias_rate=0.02), "lr": 1e-3, "steps": 4, "seq_len": 64, "data": chat_data(folder)}
    run_job(change(first, stage="midtrain", init_from=str(path / "pretrain"), rope_theta=40_000.0,
                   **{**later, "data": first.config.data}))  # fmt: skip
    run_job(change(first, stage="sft", init_from=str(path / "midtrain"), **later))
    run_job(change(first, stage="qat", init_from=str(path / "sft"), **later, quant=QuantSpec(),
                   distill=DistillConfig(teacher="init")))  # fmt: skip
    for stage in ("pretrain", "midtrain", "sft", "qat"):
        rows = read_metrics(change(first, stage=stage))
        assert len(rows[-1]["moe"]["load"]) == 2 and any(rows[0]["moe"]["dropped"]) == (stage == "pretrain")
    return path


def test_the_packed_file_says_what_the_checkpoint_says(run: Path, tmp_path: Path) -> None:
    export_packed(run, path := tmp_path / "model.pocket")
    loaded, file = load_model(run), load_packed(path)
    tokens = torch.randint(280, (2, 50), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = loaded.model(tokens)
    for row in range(2):
        ours = torch.from_numpy(file.session(50).eval(tokens[row].tolist(), all_logits=True))
        assert (ours - logits[row]).abs().max() < 1e-5 * logits.abs().max()
    for seed in range(10):
        prompt = torch.randint(280, (6,), generator=torch.Generator().manual_seed(seed)).tolist()
        assert list(generate(loaded.model, prompt, 24)) == list(generate_packed(file, prompt, 24))


def test_the_packed_file_holds_the_integers_and_biases_that_training_saw(run: Path, tmp_path: Path) -> None:
    from kernels.packed_layout import unpack_int4
    from quant.apply import convert

    export_packed(run, path := tmp_path / "model.pocket")
    latent = load_model(run, latent=True).model
    with PackedModel(path) as file:
        for layer in range(2):
            experts = f"blocks.{layer}.feed_forward.experts"
            for part, (rows, k) in {"gate_up": (64, 64), "down": (64, 32)}.items():
                codes, scales = convert(latent)[f"{experts}.{part}"]
                for expert in range(12):
                    packed = np.frombuffer(file.tensor(f"blocks.{layer}.experts.{expert}.{part}"), np.uint8)
                    got, got_scales = unpack_int4(packed, rows, k)
                    assert (codes[expert].numpy() == got).all() and (scales[expert].numpy() == got_scales).all()
            bias = torch.frombuffer(bytearray(file.tensor(f"blocks.{layer}.feed_forward.router_bias")), dtype=torch.float32)
            assert bias.any() and torch.equal(bias, latent.state_dict()[f"blocks.{layer}.feed_forward.router.bias"])


def test_groups_along_the_outputs_are_packed_and_say_the_same(run: Path, tmp_path: Path) -> None:
    first = pretrain_job(run.parent, model=TINY, output_dir=str(tmp_path / "out"))
    run_job(change(first, stage="qat", init_from=str(run / "sft"), quant=QuantSpec(expert_axis="output"), steps=1))
    export_packed(tmp_path / "out", path := tmp_path / "model.pocket")
    loaded, file = load_model(tmp_path / "out"), load_packed(path)
    tokens = torch.randint(280, (40,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = loaded.model(tokens[None])[0]
    ours = torch.from_numpy(file.session(40).eval(tokens.tolist(), all_logits=True))
    assert (ours - logits).abs().max() < 1e-5 * logits.abs().max()


def test_experts_that_no_group_fits_are_told_before_the_first_stage(tmp_path: Path) -> None:
    first = pretrain_job(tmp_path, model=replace(TINY, moe=replace(MOE, expert_size=50)), steps=1)
    last = change(first, stage="qat", init_from=str(tmp_path / "run" / "pretrain"), quant=QuantSpec())
    with pytest.raises(QuantError, match="experts.down has rows of 50 weights"):
        run_stages([first, last], Process())
    assert not (tmp_path / "run" / "pretrain").exists()
