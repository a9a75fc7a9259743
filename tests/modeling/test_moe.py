"""The mixture of experts against plain restatements, and against the nearest models of `transformers`."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from modeling.config import ModelConfig
from modeling.decoder import Decoder
from modeling.families import family
from modeling.init import init_weights
from modeling.moe import MoE, RoutingRecord, choose
from modeling.moe_config import MoEConfig

MOE = MoEConfig(num_experts=7, top_k=3, expert_size=20, shared_size=28, route_scale=2.5)
TINY = ModelConfig(
    vocab_size=61, hidden_size=32, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8, ffn_size=48, qk_norm=True,
    max_positions=64, init_std=0.2, moe=MOE,
)  # fmt: skip
VARIANTS = {
    "shared": MOE,
    "no_shared": replace(MOE, shared_size=0),
    "softmax": replace(MOE, score="softmax", normalize=False, route_scale=1.0),
    "all": replace(MOE, top_k=7),
    "one": replace(MOE, num_experts=1, top_k=1),
}


def layer(moe: MoEConfig, seed: int = 0) -> MoE:
    config = replace(TINY, moe=moe)
    model = Decoder(replace(config, num_layers=1))
    init_weights(model, seed)
    part = model.blocks[0].feed_forward
    assert isinstance(part, MoE)
    part.router.bias.copy_(torch.randn(moe.num_experts, generator=torch.Generator().manual_seed(seed)) * 0.2)
    return part


def rows(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, 32, generator=torch.Generator().manual_seed(seed))


def restated(part: MoE, token: Tensor) -> Tensor:
    """One token [D] through the layer, as the paper writes it."""
    moe, logits = part.moe, part.router.weight @ token
    scores = torch.sigmoid(logits) if moe.score == "sigmoid" else torch.softmax(logits, 0)
    order = sorted(range(moe.num_experts), key=lambda e: (-(scores[e] + part.router.bias[e]).item(), e))
    chosen = order[: moe.top_k]
    total = sum(scores[e] for e in chosen) if moe.normalize else 1.0
    out = torch.zeros_like(token) if part.shared is None else part.shared(token)
    for e in chosen:
        gate, up = (token @ part.experts.gate_up[e]).chunk(2)
        out = out + moe.route_scale * scores[e] / total * ((F.silu(gate) * up) @ part.experts.down[e])
    return out


@pytest.mark.parametrize("moe", VARIANTS.values(), ids=VARIANTS)
def test_a_layer_computes_what_the_paper_says_with_its_gradients(moe: MoEConfig) -> None:
    part, x = layer(moe), rows(2, 5)
    want = torch.stack([restated(part, token) for token in x.view(-1, 32)]).view_as(x)
    upstream = rows(2, 5, seed=3)
    wanted = torch.autograd.grad((want * upstream).sum(), list(part.parameters()))
    got = part(x, RoutingRecord())
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    for mine, theirs in zip(torch.autograd.grad((got * upstream).sum(), list(part.parameters())), wanted, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)


def test_the_gradient_reaches_the_layers_input() -> None:
    part, x = layer(MOE), rows(1, 4).requires_grad_()
    want = torch.stack([restated(part, token) for token in x.view(-1, 32)]).view_as(x)
    (wanted,) = torch.autograd.grad(want.square().sum(), x)
    (got,) = torch.autograd.grad(part(x).square().sum(), x)
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)


def test_of_equal_scores_the_lowest_expert_is_chosen_and_nan_chooses_experts_that_exist() -> None:
    assert choose(torch.tensor([[0.5, 0.9, 0.9, 0.9], [0.0, 0.0, 0.0, 0.0]]), 2).tolist() == [[1, 2], [0, 1]]
    broken = choose(torch.full((1, 4), float("nan")), 3)
    assert sorted(broken[0].tolist()) == [0, 1, 2]


def test_the_bias_chooses_but_does_not_mix() -> None:
    part, x = layer(replace(MOE, top_k=2)), rows(1, 6)
    part.router.bias.zero_()
    before, mix, _, scores = part.router(x[0])
    part.router.bias[4] = 10.0
    after, biased, _, _ = part.router(x[0])
    assert (after == 4).any(-1).all() and not (before == 4).any(-1).all()
    picked = scores.gather(1, after)
    torch.testing.assert_close(biased, 2.5 * picked / picked.sum(-1, keepdim=True))
    torch.testing.assert_close(mix.sum(-1), torch.full((6,), 2.5))


def test_the_router_stays_fp32_under_autocast() -> None:
    part, x = layer(MOE), rows(1, 9)
    _, _, plain, _ = part.router(x[0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, _, logits, _ = part.router(x[0])
        assert part(x).dtype == torch.bfloat16
    assert logits.dtype == torch.float32 and torch.equal(logits, plain)


def test_a_small_capacity_drops_the_last_comers_and_says_so() -> None:
    part, x = layer(replace(MOE, top_k=1, shared_size=0)), rows(1, 21)
    part.router.bias.zero_()
    part.router.bias[2] = 10.0  # everyone wants expert 2
    record = RoutingRecord(capacity_factor=1.0)
    out = part(x, record)
    noted = record.layers[0]
    assert noted.load.tolist() == [0, 0, 21, 0, 0, 0, 0] and noted.dropped.item() == 18
    want = part(x)
    torch.testing.assert_close(out[0, :3], want[0, :3])
    assert not out[0, 3:].any() and want[0, 3:].any()


def test_a_capacity_that_nobody_exceeds_changes_nothing() -> None:
    part, x = layer(MOE), rows(2, 11)
    roomy = RoutingRecord(capacity_factor=7.0)
    want, got = part(x), part(x, roomy)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    assert roomy.layers[0].dropped == 0
    wanted = torch.autograd.grad(want.square().sum(), list(part.parameters()))
    for mine, theirs in zip(torch.autograd.grad(got.square().sum(), list(part.parameters())), wanted, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)


def test_what_is_noted_is_what_happened() -> None:
    part, x = layer(MOE), rows(2, 5)
    record = RoutingRecord(balance_loss=True)
    part(x, record)
    noted = record.layers[0]
    experts, _, logits, scores = part.router(x.view(-1, 32))
    assert noted.load.tolist() == [int((experts == e).sum()) for e in range(7)]
    torch.testing.assert_close(noted.z, torch.log(logits.exp().sum(-1)).square().view(2, 5))
    shares = scores / scores.sum(-1, keepdim=True)
    torch.testing.assert_close(noted.entropy, -(shares * shares.log()).sum())
    for row in range(2):
        mine = experts.view(2, 5, 3)[row]
        want = sum((mine == e).sum() / 15 * shares.view(2, 5, 7)[row, :, e].mean() for e in range(7)) * 7
        assert noted.balance is not None
        torch.testing.assert_close(noted.balance[row], want)


def test_a_dense_first_layer_is_dense() -> None:
    model = Decoder(replace(TINY, moe=replace(MOE, dense_layers=1)))
    assert [isinstance(block.feed_forward, MoE) for block in model.blocks] == [False, True, True]


@pytest.mark.parametrize(("change", "words"), [
    ({"top_k": 8}, "top_k=8 is more than model.moe.num_experts=7"), ({"num_experts": 0}, "num_experts=0 must be at least 1"),
    ({"shared_size": -1}, "shared_size=-1 must not be negative"), ({"expert_size": 0}, "expert_size=0 must be at least 1"),
])  # fmt: skip
def test_a_mixture_that_cannot_be_is_refused(change: dict[str, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        replace(MOE, **change)


def test_more_dense_layers_than_layers_are_refused() -> None:
    with pytest.raises(ValueError, match="dense_layers=4 is more than model.num_layers=3"):
        replace(TINY, moe=replace(MOE, dense_layers=4))


TOKENS = torch.randint(61, (2, 13), generator=torch.Generator().manual_seed(1))


def their_state(model: Decoder, names: dict[str, str], ones: tuple[str, ...]) -> dict[str, Tensor]:
    """Our weights under another model's names; experts outputs first, and weights of one for its extra norms."""
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if name.endswith(("experts.gate_up", "experts.down")):
            tensor = tensor.transpose(1, 2).contiguous()
        for ours, theirs in {
            "blocks.": "model.layers.", "embed.": "model.embed_tokens.", "attention_norm": "input_layernorm",
            "feed_forward_norm": "post_attention_layernorm", "feed_forward.": "mlp.",
            **{f"attention.{part}.": f"self_attn.{part}_proj." for part in "qkvo"}, **names,
        }.items():  # fmt: skip
            name = name.replace(ours, theirs) if not (ours == "attention_norm" and "self_attn" in name) else name
        state["model." + name if name.startswith("norm") else name] = tensor
    for layer_index in range(model.config.num_layers):
        for one in ones:
            state[f"model.layers.{layer_index}.self_attn.{one}.weight"] = torch.ones(model.config.head_dim)
    return state


DENSE = {f"mlp.{part}.": f"mlp.{part}_proj." for part in ("gate", "up", "down")}
EXPERTS = {"experts.gate_up": "experts.gate_up_proj", "experts.down": "experts.down_proj", "router.weight": "gate.weight"}
COMMON = {
    "vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "max_position_embeddings": 64, "num_experts_per_tok": 3, "moe_intermediate_size": 20,
    "tie_word_embeddings": True, "rms_norm_eps": 1e-5, "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
    "pad_token_id": None,
}  # fmt: skip


def agree(model: Decoder, theirs: torch.nn.Module, state: dict[str, Tensor]) -> None:
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    theirs.tie_weights()  # type: ignore[operator]
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS), theirs.eval()(TOKENS).logits, atol=1e-4, rtol=0)


def test_sigmoid_routing_with_bias_shared_expert_and_a_dense_layer_is_that_of_glm4_moe() -> None:
    from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

    config = replace(TINY, moe=replace(MOE, dense_layers=1))
    model = Decoder(config).eval()
    init_weights(model, 0)
    for name, buffer in model.named_buffers():
        buffer.copy_(torch.randn(7, generator=torch.Generator().manual_seed(len(name))) * 0.3)
    hf = Glm4MoeConfig(
        **{**COMMON, "rope_parameters": {**COMMON["rope_parameters"], "partial_rotary_factor": 1.0}},  # type: ignore[dict-item]
        intermediate_size=48, n_routed_experts=7, n_shared_experts=1,
        first_k_dense_replace=1, norm_topk_prob=True, routed_scaling_factor=2.5, n_group=1, topk_group=1, use_qk_norm=True,
    )  # fmt: skip
    theirs = Glm4MoeForCausalLM(hf)
    for block in theirs.model.layers[1:]:
        block.mlp.shared_experts = type(block.mlp.shared_experts)(config=hf, intermediate_size=28)  # ours is wider than one
    names = {**DENSE, "router.bias": "gate.e_score_correction_bias", **EXPERTS, "mlp.shared.": "mlp.shared_experts.",
             **{f"shared_experts.{part}.": f"shared_experts.{part}_proj." for part in ("gate", "up", "down")}}  # fmt: skip
    agree(model, theirs, their_state(model, names, ("q_norm", "k_norm")))


@pytest.mark.parametrize("normalize", [True, False])
def test_softmax_routing_is_that_of_qwen3_moe(normalize: bool) -> None:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    moe = replace(MOE, score="softmax", shared_size=0, normalize=normalize, route_scale=1.0)
    model = Decoder(replace(TINY, moe=moe)).eval()
    init_weights(model, 0)
    theirs = Qwen3MoeForCausalLM(Qwen3MoeConfig(
        **COMMON, intermediate_size=48, num_experts=7, norm_topk_prob=normalize, decoder_sparse_step=1, mlp_only_layers=[],
    ))  # fmt: skip
    state = their_state(model, EXPERTS, ("q_norm", "k_norm"))
    agree(model, theirs, {name: tensor for name, tensor in state.items() if not name.endswith("router.bias")})


def test_mobilemoe_s_has_the_bytes_of_its_published_file() -> None:
    """713,916,240 bytes, of which its header, 443 names with types, shapes and offsets, takes 53,232: 120 a tensor."""
    config = family("mobilemoe_s")
    norms, biases = 41 * 768, 20 * 60
    published = config.weight_bytes(4, 32) - 2 * norms + 2 * biases  # bf16 there, and the biases are in the file
    assert 713_916_240 - published == 53_232
    assert [round(family(f"mobilemoe_{size}").num_active_params() / 1e6) for size in "sml"] == [272, 528, 922]


@pytest.mark.parametrize("values", [7, {"moe": 3}, {"moe": {"experts": 4}}, {"rope_scaling": "llama3"}])
def test_junk_in_place_of_a_model_is_told_as_such(values: object) -> None:
    import dataclasses

    plain = values if not isinstance(values, dict) else {**dataclasses.asdict(TINY), **values}
    with pytest.raises(TypeError):
        ModelConfig.from_plain(plain)  # type: ignore[arg-type]
    assert ModelConfig.from_plain(dataclasses.asdict(TINY)) == TINY
