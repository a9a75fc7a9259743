"""A trained mixture of experts through export and back: every layout, from the checkpoint on."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from modeling.hf_convert import LAYOUTS, ConversionError
from modeling.hf_int4 import unpack_nibbles
from modeling.moe_config import MoEConfig
from quant.apply import bake, convert, prepare
from quant.primitives import QuantError
from quant.spec import QuantSpec
from stages.distributed import Process
from stages.evaluate import perplexity
from stages.export import export_hf, int4_integers
from stages.loading import load_model
from stages.run import run_stages
from tests.helpers.commands import launch
from tests.helpers.moe_models import CONFIG, IDS, build, in_transformers
from tests.helpers.stage_jobs import MODEL, change, chat_data, pretrain_job

OUTPUT = QuantSpec(expert_axis="output")
TEXT = "the model reads a word and then guesses what the next word will be"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A few steps of pre-training, and of QAT after it."""
    folder = tmp_path_factory.mktemp("moe")
    moe = MoEConfig(num_experts=5, top_k=2, expert_size=32, shared_size=64, route_scale=2.5)
    model = replace(MODEL, hidden_size=64, head_dim=32, qk_norm=True, ffn_size=128, moe=moe)
    first = pretrain_job(folder, model=model, steps=6, lr=1e-2)
    aware = change(first, stage="qat", init_from=f"{first.output_dir}/pretrain", data=chat_data(folder), quant=OUTPUT,
                   seq_len=64, lr=1e-3, steps=3)  # fmt: skip
    plain, quantized = run_stages([first, aware], Process())
    return plain.checkpoint, quantized.checkpoint


def test_a_checkpoint_is_exported_and_loaded_with_its_logits(checkpoints: tuple[Path, Path], tmp_path: Path) -> None:
    source = load_model(checkpoints[0])
    export_hf(checkpoints[0], tmp_path / "hf")
    again = load_model(tmp_path / "hf")
    assert again.model.config == source.model.config and source.model.blocks[0].feed_forward.router.bias.any()
    assert torch.equal(again.model(IDS), source.model(IDS))
    assert perplexity(again, [TEXT]) == perplexity(source, [TEXT])
    theirs = in_transformers(tmp_path / "hf")
    with torch.no_grad():
        torch.testing.assert_close(theirs(IDS).logits, source.model(IDS), atol=1e-4, rtol=0)
    assert theirs.generation_config.eos_token_id is not None


def test_a_qat_checkpoint_is_exported_on_its_grid(checkpoints: tuple[Path, Path], tmp_path: Path) -> None:
    export_hf(checkpoints[1], tmp_path / "hf")
    plain = load_model(tmp_path / "hf").model.state_dict()
    source = load_model(checkpoints[1], latent=True).model
    for name, weight in bake(source).items():
        assert torch.equal(plain[name], weight)


def test_the_int4_form_holds_the_codes_of_training(checkpoints: tuple[Path, Path], tmp_path: Path) -> None:
    done = launch("export", "--checkpoint", str(checkpoints[1]), "--to", "hf", "--layout", "mobilemoe-int4",
                  "--output", str(tmp_path / "hf"))
    assert done.returncode == 0, done.stderr
    stored = load_file(tmp_path / "hf" / "model.safetensors")
    trained = convert(load_model(checkpoints[1], latent=True).model)
    for ours, theirs in (("embed", "model.embed_tokens"), ("blocks.1.attention.o", "model.layers.1.self_attn.o_proj"),
                         ("blocks.0.feed_forward.shared.up", "model.layers.0.feed_forward.shared_expert.up_proj")):
        codes, scales = trained[f"{ours}.weight"]
        assert torch.equal(unpack_nibbles(stored[f"{theirs}.qweight"]), codes)
        assert torch.equal(stored[f"{theirs}.weight_scale"], scales)
    codes, scales = trained["blocks.1.feed_forward.experts.gate_up"]
    assert torch.equal(unpack_nibbles(stored["model.layers.1.feed_forward.experts.gate_up_qweight"]), codes)
    assert torch.equal(stored["model.layers.1.feed_forward.experts.gate_up_scale"], scales)
    again = load_model(tmp_path / "hf").model
    theirs_model = in_transformers(tmp_path / "hf", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(theirs_model(IDS).logits, again(IDS), atol=1e-4, rtol=0)
    assert json.loads((tmp_path / "hf" / "lineage.json").read_text())["quant"]["weight_bits"] == 4


def test_an_untrained_model_is_rounded_to_nearest_experts_along_their_output() -> None:
    model = build()
    integers = int4_integers(model, None)
    codes, scales = integers["blocks.0.feed_forward.experts.down"]
    weight = model.get_parameter("blocks.0.feed_forward.experts.down")
    assert codes.shape == (7, 32, 64) and scales.shape == (7, 32, 2)
    group = weight[3, 5, 32:]
    assert scales[3, 5, 1] == (group.abs().max() * 2 / 15).half()
    assert torch.equal(codes[3, 5, 32:], (group / scales[3, 5, 1].float()).round().clamp(-8, 7).to(torch.int8))


@pytest.mark.parametrize("spec", [
    QuantSpec(), replace(OUTPUT, weight_bits=8), replace(OUTPUT, group_size=16), replace(OUTPUT, embedding=False),
], ids=str)  # fmt: skip
def test_another_grid_is_refused(spec: QuantSpec) -> None:
    with pytest.raises(QuantError, match="INT4 in groups of 32, embedding too, experts in groups along their output"):
        int4_integers(prepare(build(), spec), spec)  # type: ignore[arg-type]


def test_rows_that_groups_do_not_fill_and_weights_without_value_are_refused() -> None:
    assert CONFIG.moe is not None
    with pytest.raises(QuantError, match="rows of 40 weights, which quant.group_size=32 does not divide"):
        int4_integers(build(replace(CONFIG, moe=replace(CONFIG.moe, expert_size=20))), None)
    model = build()
    model.get_parameter("blocks.2.feed_forward.experts.down")[0, 0, 0] = float("nan")
    with pytest.raises(QuantError, match="experts.down holds NaN"):
        int4_integers(model, None)


def test_a_mixture_that_no_layout_holds_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    moe = MoEConfig(num_experts=3, top_k=1, expert_size=32, dense_layers=1)
    job = pretrain_job(tmp_path / "job", model=replace(MODEL, qk_norm=True, moe=moe), steps=1)
    checkpoint = run_stages([job], Process())[0].checkpoint
    with pytest.raises(ConversionError, match="first 1 are dense"):
        export_hf(checkpoint, tmp_path / "hf", "mobilemoe")
    done = launch("export", "--checkpoint", str(checkpoint), "--to", "hf", "--layout", "llama4",
                  "--output", str(tmp_path / "hf"))
    assert done.returncode == 2 and "the llama4 layout has no experts" in done.stderr and len(done.stderr.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["job"]


def test_a_dense_model_has_no_experts_to_write(tmp_path: Path) -> None:
    job = pretrain_job(tmp_path / "job", steps=1)
    with pytest.raises(ConversionError, match="the mobilemoe-int4 layout needs experts"):
        export_hf(run_stages([job], Process())[0].checkpoint, tmp_path / "hf", "mobilemoe-int4")


def test_the_command_knows_every_layout() -> None:
    listed = re.search(r"--layout \{([^}]+)\}", launch("export", "--help").stdout.replace("\n", ""))
    assert listed is not None and tuple(listed[1].replace(" ", "").split(",")) == LAYOUTS
