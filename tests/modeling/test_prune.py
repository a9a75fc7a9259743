"""Pruning: what does nothing can go without a trace, what stays stays bit for bit, what cannot be had is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from modeling.decoder import Decoder
from modeling.importance import norm_names, uniform_importance
from modeling.moe_config import MoEConfig
from modeling.prune import plan_pruning, prune, uncovered
from modeling.supernet import Supernet
from stages.importance import calibrate
from tests.helpers.prunable import BACKBONE, TOKENS, decoder, load, random_importance

CONFIGS = {
    "full": BACKBONE,
    "mixed": replace(BACKBONE, attention=("full", "skip", "window", "full")),
    "untied": replace(BACKBONE, tie_embeddings=False, qk_norm=True),
    "shared": replace(BACKBONE, num_layers=2, block_repeat=2),
}


def pruned_logits(model: Decoder, importance, target, **options) -> torch.Tensor:
    return load(target, prune(model.config, model.state_dict(), importance, target, **options))(TOKENS)


def assert_same_function(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Only the order of fp32 sums may differ."""
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("share", ["first", "best", "mean"])
@pytest.mark.parametrize("name", CONFIGS)
def test_pruning_to_the_same_shape_is_bit_equal(name, share):
    model = decoder(CONFIGS[name])
    state = prune(model.config, model.state_dict(), random_importance(model.config), model.config, share=share)
    assert state.keys() == model.state_dict().keys()
    for key, tensor in model.state_dict().items():
        assert torch.equal(state[key], tensor), key
        assert state[key].data_ptr() != tensor.data_ptr() or "norm" not in key


def test_silent_ffn_channels_go_without_a_trace():
    model, importance = decoder(), random_importance()
    for index, block in enumerate(model.blocks):
        quiet = torch.randperm(40, generator=torch.Generator().manual_seed(index))[:15]
        block.feed_forward.down.weight[:, quiet] = 0
        importance.ffn[index, quiet] = 0
    found = pruned_logits(model, importance, replace(BACKBONE, ffn_size=25))
    assert_same_function(found, model(TOKENS))


def test_silent_heads_go_with_their_group():
    model, importance = decoder(), random_importance()
    for index, block in enumerate(model.blocks):
        quiet = [(index + 1) % 4, (index + 3) % 4]  # key/value heads; each has two query heads
        for head in (2 * group + i for group in quiet for i in range(2)):
            block.attention.o.weight[:, 8 * head : 8 * head + 8] = 0
            importance.heads[index, head] = 0
    found = pruned_logits(model, importance, replace(BACKBONE, num_heads=4, num_kv_heads=2))
    assert_same_function(found, model(TOKENS))


def test_silent_query_heads_go_one_a_group():
    model, importance = decoder(), random_importance()
    for index, block in enumerate(model.blocks):
        for group in range(4):
            head = 2 * group + (index + group) % 2
            block.attention.o.weight[:, 8 * head : 8 * head + 8] = 0
            importance.heads[index, head] = 0
    found = pruned_logits(model, importance, replace(BACKBONE, num_heads=4))
    assert_same_function(found, model(TOKENS))


def test_equal_key_value_heads_merge_without_a_trace():
    """8 query heads on 4 key/value heads to 8 on 2: neighbours are averaged, and equal ones stay what they are."""
    model = decoder()
    for block in model.blocks:
        for projection in (block.attention.k, block.attention.v):
            heads = projection.weight.view(2, 2, 8, 48)
            heads[:, 1] = heads[:, 0]
    found = pruned_logits(model, random_importance(), replace(BACKBONE, num_kv_heads=2))
    assert_same_function(found, model(TOKENS))


def test_groups_that_do_not_divide_read_the_mean_of_their_heads():
    """6 query heads on 3 key/value heads to 6 on 2: each new head is two parts of one old head and one of another."""
    config = replace(BACKBONE, num_heads=6, num_kv_heads=3)
    model = decoder(config)
    state = prune(config, model.state_dict(), random_importance(config), replace(config, num_kv_heads=2))
    old = model.blocks[1].attention.v.weight.view(3, 8, 48)
    expected = torch.cat([(2 * old[0] + old[1]) / 3, (old[1] + 2 * old[2]) / 3])
    torch.testing.assert_close(state["blocks.1.attention.v.weight"], expected)


@pytest.mark.parametrize("eps, tolerance", [(0.0, 2e-5), (1e-5, 1e-3)])
def test_silent_residual_channels_go_with_the_norms_scale(eps, tolerance):
    """All that writes channel j is 0, so the norms read 0 there: sqrt(all / kept) on their weights undoes the mean."""
    config = replace(BACKBONE, norm_eps=eps or 1e-30)
    model, importance = decoder(config), random_importance(config)
    quiet = torch.randperm(48, generator=torch.Generator().manual_seed(3))[:20]
    model.embed.weight[:, quiet] = 0
    for block in model.blocks:
        block.attention.o.weight[quiet] = 0
        block.feed_forward.down.weight[quiet] = 0
    importance.hidden[quiet] = 0
    for share in importance.norm_energy.values():
        share[quiet] = 0
        share /= share.sum()
    expected = model(TOKENS)
    target = replace(config, hidden_size=28)
    state = prune(config, model.state_dict(), importance, target)
    kept = importance.hidden.nonzero().squeeze(-1)
    torch.testing.assert_close(state["norm.weight"], model.norm.weight[kept] * (48 / 28) ** 0.5)
    torch.testing.assert_close(load(target, state)(TOKENS), expected, rtol=0, atol=tolerance * float(expected.abs().max()))
    for name in norm_names(target):  # without the correction the function is another one
        state[f"{name}.weight"] *= (28 / 48) ** 0.5
    assert (load(target, state)(TOKENS) - expected).abs().max() > 0.05 * expected.abs().max()


def test_norms_keep_their_weight_where_all_channels_hold_the_same_energy():
    model = decoder()
    state = prune(BACKBONE, model.state_dict(), uniform_importance(BACKBONE), replace(BACKBONE, hidden_size=12))
    torch.testing.assert_close(state["norm.weight"], model.norm.weight[:12])


def test_silent_blocks_and_silent_attention_go_without_a_trace():
    model, importance = decoder(), random_importance()
    model.blocks[1].attention.o.weight.zero_()
    model.blocks[1].feed_forward.down.weight.zero_()
    importance.blocks[1] = importance.attention[1] = 0
    model.blocks[2].attention.o.weight.zero_()
    importance.attention[2] = 0
    target = replace(BACKBONE, num_layers=3, attention=("full", "skip", "full"))
    assert_same_function(pruned_logits(model, importance, target), model(TOKENS))


def test_blocks_are_aligned_so_that_skipped_attention_costs_least():
    """One block goes and one slot skips: block 0 has idle attention but slot 0 attends, so the skip falls on block 2."""
    importance = uniform_importance(BACKBONE)
    importance.blocks[:] = torch.tensor([1.0, 0.9, 1.0, 1.0])
    importance.attention[:] = torch.tensor([0.0, 0.8, 0.1, 0.8])
    target = replace(BACKBONE, num_layers=3, attention=("full", "skip", "full"))
    plan = plan_pruning(BACKBONE, importance, target)
    assert [block.sources[0].index for block in plan.blocks] == [0, 2, 3]


def test_a_repeated_block_can_fall_apart_without_a_trace():
    config = CONFIGS["shared"]
    model = decoder(config)
    found = pruned_logits(model, random_importance(config), replace(config, num_layers=4, block_repeat=1))
    assert torch.equal(found, model(TOKENS))


@pytest.mark.parametrize("share, sources", [("first", [[0], [2]]), ("best", [[1], [2]]), ("mean", [[0, 1], [2, 3]])])
def test_shared_blocks_come_from_neighbours(share, sources):
    importance = uniform_importance(BACKBONE)
    importance.blocks[1] = 2.0
    target = replace(BACKBONE, num_layers=2, block_repeat=2)
    plan = plan_pruning(BACKBONE, importance, target, share=share)
    assert [[source.index for source in block.sources] for block in plan.blocks] == sources
    assert {block.step for block in plan.blocks} == {1.0}


def test_equal_neighbours_share_one_block_without_a_trace():
    model = decoder()
    for one, other in ((0, 1), (2, 3)):
        model.blocks[other].load_state_dict(model.blocks[one].state_dict())
    target = replace(BACKBONE, num_layers=2, block_repeat=2)
    for share in ("first", "best", "mean"):
        assert_same_function(pruned_logits(model, random_importance(), target, share=share), model(TOKENS))


def test_a_block_that_runs_twice_takes_half_a_step_each_time():
    model = decoder(replace(BACKBONE, init_std=0.02))
    target = replace(model.config, block_repeat=2)
    state = prune(model.config, model.state_dict(), random_importance(), target)
    assert torch.equal(state["blocks.0.attention.o.weight"], model.blocks[0].attention.o.weight / 2)
    expected, twice = model(TOKENS), load(target, model.state_dict())(TOKENS)
    halved = load(target, state)(TOKENS)
    assert (halved - expected).abs().mean() < 0.3 * (twice - expected).abs().mean()


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(hidden_size=64), "hidden_size 64 is larger than the backbone's 48"),
        (dict(ffn_size=41), "ffn_size 41 is larger than the backbone's 40"),
        (dict(num_heads=16), "num_heads 16 is larger than the backbone's 8"),
        (dict(num_kv_heads=8), "num_kv_heads 8 is larger than the backbone's 4"),
        (dict(num_layers=5), "num_layers 5 is larger than the backbone's 4"),
        (dict(vocab_size=60), "vocab_size 60 is not the backbone's 61"),
        (dict(head_dim=4), "head_dim 4 is not the backbone's 8"),
        (dict(qk_norm=True), "qk_norm True is not the backbone's False"),
    ],
)
def test_what_the_backbone_lacks_is_refused_by_name(changes, words):
    model, target = decoder(), replace(BACKBONE, **changes)
    assert uncovered(BACKBONE, target)[0].startswith(words)
    with pytest.raises(ValueError, match="does not cover") as caught:
        prune(BACKBONE, model.state_dict(), random_importance(), target)
    assert words in str(caught.value)


def test_attention_cannot_be_made_out_of_nothing():
    backbone = CONFIGS["mixed"]
    assert not uncovered(backbone, replace(backbone, num_layers=3, attention=("full", "full", "full")))
    problem = uncovered(backbone, replace(backbone, attention=("full", "full", "full", "full")))
    assert problem == ["attention has 4 attending blocks where the backbone's 3 cannot stand in the same order"]
    assert uncovered(CONFIGS["untied"], replace(CONFIGS["untied"], tie_embeddings=True))[0].startswith("tie_embeddings")
    assert uncovered(CONFIGS["shared"], replace(CONFIGS["shared"], block_repeat=3))[0].startswith("block_repeat 3")


def test_importance_of_another_model_or_without_numbers_is_refused():
    importance, model = random_importance(), decoder()
    wider = replace(BACKBONE, ffn_size=44)
    with pytest.raises(ValueError, match=r"importance ffn has shape \(4, 40\), the backbone needs \(4, 44\)"):
        prune(wider, decoder(wider).state_dict(), importance, replace(wider, ffn_size=8))
    importance.norm_energy["norm"][3] = float("nan")
    with pytest.raises(ValueError, match=r"norm_energy.norm holds NaN"):
        prune(BACKBONE, model.state_dict(), importance, BACKBONE)


def test_a_mixture_of_experts_is_no_backbone_and_no_target():
    moe = replace(BACKBONE, moe=MoEConfig(num_experts=4, top_k=2, expert_size=8))
    assert uncovered(moe, BACKBONE) == ["moe: the backbone has experts, and only dense models are cut"]
    assert uncovered(BACKBONE, moe) == ["moe: it has experts, and only dense models are cut"]
    with pytest.raises(ValueError, match="the largest model is a mixture of experts"):
        Supernet(moe, "plain", 1)
    with pytest.raises(ValueError, match="the model has experts; importance is measured"):
        calibrate(Decoder(moe), [])
