"""The calibration pass against plain restatements, and its file."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from data_pipeline.loader import Batch
from modeling.importance import norm_names
from modeling.prune import prune
from stages.errors import CheckpointError, InputError
from stages.importance import VARIANTS, calibrate
from stages.importance_file import Calibration, calibrate_checkpoint, load_scores
from tests.helpers.prunable import BACKBONE, decoder, load
from tests.helpers.stage_jobs import pretrain_job, run_job

CONFIG = replace(BACKBONE, attention=("full", "skip", "window", "full"))


def batch(seed: int = 0, rows: int = 2, padded: int = 3) -> Batch:
    """Rows of one document each, the last `padded` tokens padding."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 61, (rows, 12), generator=generator)
    labels = torch.randint(0, 61, (rows, 12), generator=generator)
    positions = torch.arange(12).repeat(rows, 1)
    if padded:
        labels[:, -padded:], positions[:, -padded:] = -100, 0
    return Batch(tokens, labels, positions, torch.zeros(rows, dtype=torch.int64))


@pytest.fixture(scope="module")
def scores():
    return calibrate(decoder(CONFIG), [batch(0), batch(1)])


def captured(model, name: str, data: Batch, *, output: bool = False) -> torch.Tensor:
    """What a module reads (or gives), [counted tokens, size]."""
    seen = []
    handle = model.get_submodule(name).register_forward_hook(lambda _, i, o: seen.append(o if output else i[0]))
    model.hidden(data.tokens, data.positions)
    handle.remove()
    return seen[0][data.labels != -100].double()


def test_loss_and_tokens_are_those_of_the_counted_tokens(scores):
    model, parts = decoder(CONFIG), []
    for data in (batch(0), batch(1)):
        logits = model(data.tokens, data.positions)
        parts.append(F.cross_entropy(logits.flatten(0, 1), data.labels.flatten(), reduction="sum"))
    assert scores.tokens == 36
    assert scores.loss == pytest.approx(float(sum(parts)) / 36, rel=1e-5)


def test_magnitude_energy_and_wanda_are_their_formulas(scores):
    model = decoder(CONFIG)
    read = torch.cat([captured(model, "blocks.2.feed_forward.down", data) for data in (batch(0), batch(1))])
    columns = model.blocks[2].feed_forward.down.weight.double().square().sum(dim=0)
    for variant, expected in (("magnitude", read.abs().mean(0)), ("energy", read.square().mean(0)),
                              ("wanda", read.square().mean(0) * columns), ("weights", columns)):
        torch.testing.assert_close(scores.tensors[f"ffn.{variant}"][2], expected.float(), rtol=1e-4, atol=1e-7)
    read = torch.cat([captured(model, "blocks.3.attention.o", data) for data in (batch(0), batch(1))])
    columns = model.blocks[3].attention.o.weight.double().square().sum(dim=0)
    heads = (read.square().mean(0) * columns).view(8, 8).sum(1)
    torch.testing.assert_close(scores.tensors["heads.wanda"][3], heads.float(), rtol=1e-4, atol=1e-7)
    assert scores.tensors["heads.wanda"][1].eq(0).all()
    total = sum(torch.cat([captured(model, name, data, output=True) for data in (batch(0), batch(1))]).square().mean(0)
                for name in norm_names(CONFIG))
    torch.testing.assert_close(scores.tensors["hidden.energy"], total.float(), rtol=1e-4, atol=1e-7)


def test_norm_energy_is_the_mean_share_of_each_channel(scores):
    model = decoder(CONFIG)
    read = torch.cat([captured(model, "blocks.0.feed_forward_norm", data) for data in (batch(0), batch(1))]).square()
    expected = (read / read.sum(-1, keepdim=True)).mean(0).float()
    torch.testing.assert_close(scores.tensors["norm_energy.blocks.0.feed_forward_norm"], expected, rtol=1e-4, atol=1e-7)
    for name in norm_names(CONFIG):
        assert float(scores.tensors[f"norm_energy.{name}"].sum()) == pytest.approx(1, rel=1e-5)


def test_taylor_is_the_loss_change_of_a_small_step_in_a_channel():
    """Scaling channel c by 1 + e changes the loss by e x (sum of activation x gradient): here of one row."""
    model, data = decoder(CONFIG).double(), batch(0, rows=1)
    found = calibrate(model, [data], drop_batches=0).tensors
    for part, module, width in (("ffn", "blocks.0.feed_forward.down", 1), ("heads", "blocks.2.attention.o", 8)):
        block = int(module.split(".")[1])
        for index in (0, 5):
            changes = []
            for step in (1e-4, -1e-4):
                scaled = decoder(CONFIG).double()
                weight = scaled.get_submodule(module).weight
                weight[:, index * width : (index + 1) * width] *= 1 + step
                logits = scaled(data.tokens, data.positions).flatten(0, 1)
                changes.append(F.cross_entropy(logits, data.labels.flatten(), reduction="sum"))
            slope = float(changes[0] - changes[1]) / 2e-4
            assert float(found[f"{part}.taylor"][block, index]) == pytest.approx(abs(slope) / 9, rel=1e-3)


def test_block_scores_are_cosine_and_loss_of_leaving_it_out(scores):
    model, data = decoder(CONFIG), batch(0)
    before = captured(model, "blocks.2.attention_norm", data)
    added = captured(model, "blocks.2.attention", data, output=True)
    one = calibrate(decoder(CONFIG), [data], drop_batches=1)
    cosine = 1 - F.cosine_similarity(before, before + added, dim=-1).mean()
    assert float(one.tensors["attention.cosine"][2]) == pytest.approx(float(cosine), rel=1e-4)
    after = captured(model, "blocks.3.attention_norm", data)
    assert float(one.tensors["blocks.cosine"][2]) == pytest.approx(
        float(1 - F.cosine_similarity(before, after, dim=-1).mean()), rel=1e-4)
    assert float(one.tensors["attention.cosine"][1]) == float(one.tensors["attention.loss"][1]) == 0
    dropped, importance = float(one.tensors["blocks.loss"][2]), one.importance("energy", "loss")
    importance.blocks[2] = -1e9  # pruning then leaves out block 2, whose loss was measured
    smaller = replace(CONFIG, num_layers=3, attention=("full", "skip", "full"))
    pruned = load(smaller, prune(CONFIG, model.state_dict(), importance, smaller))
    logits = pruned(data.tokens, data.positions)
    rise = float(F.cross_entropy(logits.flatten(0, 1), data.labels.flatten())) - one.loss
    assert dropped == pytest.approx(rise, rel=1e-3, abs=1e-5)


def test_calibration_leaves_the_model_as_it_was_and_repeated_blocks_count_each_pass():
    shared = replace(BACKBONE, num_layers=2, block_repeat=2)
    model = decoder(shared)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    logits = model(batch().tokens)
    first, second = calibrate(model, [batch()]), calibrate(model, [batch()])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(model(batch().tokens), logits)
    assert all(torch.equal(first.tensors[name], second.tensors[name]) for name in first.tensors)
    apart = replace(BACKBONE, num_layers=4)
    unshared = decoder(apart)
    for index, block in enumerate(unshared.blocks):
        block.load_state_dict(model.blocks[index // 2].state_dict())
    unshared.embed.load_state_dict(model.embed.state_dict())
    unshared.norm.load_state_dict(model.norm.state_dict())
    parts = calibrate(unshared, [batch()]).tensors
    for name in ("ffn.energy", "heads.magnitude", "blocks.cosine"):
        pairs = parts[name].view(2, 2, *parts[name].shape[1:]).sum(1)
        torch.testing.assert_close(first.tensors[name], pairs, rtol=1e-4, atol=1e-7)


def test_every_variant_prunes_and_an_unknown_one_is_named(scores):
    target = replace(CONFIG, hidden_size=32, ffn_size=24, num_heads=4)
    states = {v: prune(CONFIG, decoder(CONFIG).state_dict(), scores.importance(v), target) for v in VARIANTS}
    assert len({float(state["blocks.0.feed_forward.up.weight"].sum()) for state in states.values()}) > 3
    with pytest.raises(ValueError, match="no variant 'magic'.*magnitude"):
        scores.importance("magic")
    with pytest.raises(ValueError, match="no layer score 'loss'.*cosine"):
        calibrate(decoder(CONFIG), [batch()], drop_batches=0).importance("energy", "loss")


def test_nothing_to_predict_and_a_broken_backbone_are_refused():
    with pytest.raises(ValueError, match="no token to predict"):
        calibrate(decoder(CONFIG), [batch(padded=12)])
    broken = decoder(CONFIG)
    broken.norm.weight[0] = float("nan")
    with pytest.raises(ValueError, match="finite"):
        calibrate(broken, [batch()])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("backbone")
    job = pretrain_job(folder, steps=2)
    run_job(job)
    return job


def test_a_run_is_calibrated_once_and_its_file_is_checked(trained, tmp_path):
    data, options = trained.config.data, Calibration(sequences=4, seq_len=32, micro_batch=2)
    path = calibrate_checkpoint(trained.output_dir, data, options, trained.cache_dir)
    assert path.parent == trained.folder / "importance"
    stamp = path.stat().st_mtime_ns
    assert calibrate_checkpoint(trained.folder, data, options, trained.cache_dir) == path
    assert path.stat().st_mtime_ns == stamp
    other = calibrate_checkpoint(trained.folder, data, replace(options, sequences=2), trained.cache_dir)
    assert other != path
    scores, document = load_scores(path)
    assert scores.config == trained.model and document["data_fingerprint"]
    scores.importance("taylor", "loss").check(trained.model)
    file = path.with_suffix(".safetensors")
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=file.name):
        load_scores(path)
    path.write_text(json.dumps({"model": 3}))
    with pytest.raises(CheckpointError, match="no importance of ours"):
        load_scores(path)


def test_options_that_do_not_fit_are_refused(trained):
    with pytest.raises(InputError, match="longer than the model's 64"):
        calibrate_checkpoint(trained.output_dir, trained.config.data, Calibration(seq_len=128), trained.cache_dir)
    with pytest.raises(InputError, match="sequences=0"):
        Calibration(sequences=0)
