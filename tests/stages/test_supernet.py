"""The supernet: its weights are its formula's, its extracts are ordinary models, training improves all sizes."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from data_pipeline.prepare import ensure_tokenizer, prepare_stage
from launch.search_quality import SupernetQuality
from modeling.supernet import Supernet, encode, sandwich
from stages.config import OptimConfig
from stages.errors import CheckpointError
from stages.evaluate import perplexity
from stages.loading import load_model
from stages.objectives import TrainableModel
from stages.scoring import Scorer
from stages.supernet import (
    SupernetModel,
    candidate_nll,
    load_supernet,
    save_supernet,
    train_supernet,
    write_extracted,
)
from tests.helpers.prunable import BACKBONE, TOKENS, load
from tests.helpers.stage_jobs import MODEL, change, losses, pretrain_job, run_job

SMALL = replace(BACKBONE, num_layers=2, hidden_size=24, ffn_size=16, num_heads=4, num_kv_heads=2, attention=("full", "skip"))
ROUTINGS = ("plain", "layer", "neuron")


def supernet(routing: str, largest=BACKBONE) -> Supernet:
    made = Supernet(largest, routing)
    made.init_weights(0)
    return made


@pytest.mark.parametrize("routing", ROUTINGS)
def test_a_candidate_runs_with_the_first_parts_of_the_mixture(routing):
    net = supernet(routing)
    weights = net.extract(SMALL)
    experts = net.weights_by_name["blocks/1/feed_forward/up/weight"]
    index = net.matrices.index("blocks.1.feed_forward.up.weight")
    mixture = net.mixtures(SMALL)[index]
    assert mixture.shape == {"plain": (1, 1, 1), "layer": (2, 1, 1), "neuron": (2, 40, 1)}[routing]
    torch.testing.assert_close(mixture.sum(0), torch.ones_like(mixture[0]))
    mixed = sum(mixture[i] * experts[i] for i in range(len(experts)))
    torch.testing.assert_close(weights["blocks.1.feed_forward.up.weight"], mixed[:16, :24])
    assert torch.equal(weights["embed.weight"], net.weights_by_name["embed/weight"][:, :24])
    assert torch.equal(weights["norm.weight"], torch.ones(24))
    hidden, head = net.hidden(SMALL, TOKENS, None)
    torch.testing.assert_close(hidden @ head.T, load(SMALL, weights)(TOKENS))


def test_plain_sharing_gives_neighbours_the_same_weights_and_routing_gives_each_its_own():
    other = replace(SMALL, ffn_size=24)
    for routing in ROUTINGS:
        net = supernet(routing)
        one, two = (net.extract(candidate)["blocks.0.attention.q.weight"] for candidate in (SMALL, other))
        assert torch.equal(one, two) == (routing == "plain")


@pytest.mark.parametrize("routing", ROUTINGS)
def test_a_fresh_candidate_spreads_as_an_ordinary_model_does(routing):
    large = replace(BACKBONE, ffn_size=256, init_std=0.08)
    weights = supernet(routing, large).extract(large)
    residual = 0.08 / (2 * large.num_layers) ** 0.5
    assert float(weights["blocks.0.feed_forward.up.weight"].std()) == pytest.approx(0.08, rel=0.05)
    assert float(weights["blocks.1.feed_forward.down.weight"].std()) == pytest.approx(residual, rel=0.05)
    assert float(weights["embed.weight"].std()) == pytest.approx(0.08, rel=0.05)


@pytest.mark.parametrize("routing", ROUTINGS)
def test_gradients_reach_every_expert_and_the_router(routing):
    net = supernet(routing)
    module = SupernetModel(net, sandwich(BACKBONE, SMALL, lambda draw: SMALL, 0, 0))
    labels = TOKENS.roll(-1, 1)
    loss = module(TOKENS, None, labels)
    expected = [TrainableModel(load(c, net.extract(c)))(TOKENS, None, labels) for c in (BACKBONE, SMALL)]
    torch.testing.assert_close(loss, torch.stack(expected).mean())
    loss.backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    torch.testing.assert_close(expected[1], F.cross_entropy(
        load(SMALL, net.extract(SMALL))(TOKENS).flatten(0, 1), labels.flatten(), reduction="sum"))


def test_the_sandwich_holds_both_ends_and_repeats_by_seed():
    def draw(generator: random.Random):
        return replace(SMALL, ffn_size=generator.choice((16, 24, 32, 40)))

    first, second = (sandwich(BACKBONE, SMALL, draw, 3, seed=5) for _ in range(2))
    steps = [next(first) for _ in range(4)]
    assert steps == [next(second) for _ in range(4)]
    assert all(step[:2] == [BACKBONE, SMALL] and len(step) == 5 for step in steps)
    assert len({candidate for step in steps for candidate in step[2:]}) > 1


def test_an_encoding_tells_architectures_apart():
    variants = [SMALL, replace(SMALL, ffn_size=24), replace(SMALL, attention=("skip", "full")), replace(SMALL, num_kv_heads=4),
                replace(SMALL, num_layers=3, attention=("full", "skip", "full")), replace(SMALL, block_repeat=2)]
    encoded = [tuple(encode(variant, BACKBONE).tolist()) for variant in variants]
    assert len(set(encoded)) == len(variants) and {len(code) for code in encoded} == {6 + 3 * 4}


def test_what_it_does_not_cover_is_refused():
    with pytest.raises(ValueError, match="ffn_size 44 is larger"):
        supernet("plain").extract(replace(BACKBONE, ffn_size=44))
    with pytest.raises(ValueError, match="between 1 experts"):
        Supernet(BACKBONE, "layer", experts=1)


@pytest.mark.parametrize("routing", ["plain", "neuron"])
def test_training_improves_every_size_and_an_extract_trains_on(routing, tmp_path):
    job = pretrain_job(tmp_path, steps=25, lr=1e-2)
    tokenizer = ensure_tokenizer(job.tokenizer, job.config.data, job.cache_dir, 0)
    data = prepare_stage(job.config.data, tokenizer, 32, job.cache_dir, 0)
    small = replace(MODEL, num_layers=1, ffn_size=32, hidden_size=24)
    net, rows = supernet(routing, MODEL), []

    def held_out(candidate) -> float:
        scorer = Scorer(token_nll=candidate_nll(net, candidate), tokenizer=tokenizer, context=64)
        return perplexity(scorer, ["the model reads a word and then guesses the next word"])["loss"]

    before = [held_out(candidate) for candidate in (MODEL, small)]
    config = replace(job.config, optim=OptimConfig(lr=1e-2, warmup_steps=2))
    train_supernet(net, small, lambda draw: replace(small, ffn_size=draw.choice((32, 48))), config, data, sampled=1,
                   log_every=5, log=rows.append)  # fmt: skip
    after = [held_out(candidate) for candidate in (MODEL, small)]
    assert all(b < a - 1 for a, b in zip(before, after, strict=True))
    assert [row["step"] for row in rows] == [1, 5, 10, 15, 20, 25]
    save_supernet(net, tmp_path / "net", tokens=3200, tokenizer=tokenizer)
    again, known, tokens = load_supernet(tmp_path / "net")
    assert (tokens, known.fingerprint) == (3200, tokenizer.fingerprint)
    assert all(torch.equal(tensor, again.extract(small)[name]) for name, tensor in net.extract(small).items())
    quality = SupernetQuality(supernet=str(tmp_path / "net"), texts=("the model reads a word and then guesses the next word",))
    assert quality(small, 1, 0).loss == pytest.approx(after[1])
    assert "ffn_size 128 is larger" in quality(replace(MODEL, ffn_size=128), 1, 0).reason
    (tmp_path / "net/supernet.safetensors").write_bytes(b"x" * 50)
    with pytest.raises(CheckpointError, match="supernet.safetensors is missing or not what was written"):
        load_supernet(tmp_path / "net")
    path = write_extracted(net, small, tokenizer, tmp_path / "small", data=data, tokens=25 * 4 * 32)
    loaded = load_model(path)
    assert perplexity(loaded, ["the model reads a word and then guesses the next word"])["loss"] == pytest.approx(after[1])
    assert loaded.lineage.tokens_seen == 3200 and loaded.lineage.pruning["routing"] == routing
    going = change(job, model=small, init_from=str(tmp_path / "small"), output_dir=str(tmp_path / "on"), steps=2, lr=1e-3)
    run_job(going)
    assert losses(going)[0] < 4.5
