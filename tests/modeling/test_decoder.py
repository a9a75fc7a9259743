"""The decoder against plain restatements of what it should do, and its config's sums against the built module."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from modeling.attention import attend
from modeling.config import ModelConfig
from modeling.decoder import Decoder, KVCache
from modeling.families import FAMILIES, family
from modeling.generate import generate, sample
from modeling.init import init_weights
from modeling.layers import RMSNorm
from modeling.moe_config import MoEConfig

TINY = ModelConfig(
    vocab_size=61, hidden_size=32, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=8, ffn_size=48, window=5,
    max_positions=64, init_std=0.2,
)  # fmt: skip
VARIANTS = {
    "full": TINY,
    "window": replace(TINY, attention=("full", "window", "window", "full")),
    "skip": replace(TINY, attention=("full", "skip", "full", "skip")),
    "shared": replace(TINY, num_layers=2, block_repeat=2),
    "qk_norm": replace(TINY, qk_norm=True),
    "untied": replace(TINY, tie_embeddings=False),
    "moe": replace(TINY, moe=MoEConfig(num_experts=6, top_k=2, expert_size=16, shared_size=24, dense_layers=1)),
    "everything": replace(TINY, attention=("window", "skip", "full", "window"), block_repeat=2, qk_norm=True),
}
PUBLISHED = {
    "mobilellm_125m": 124_635_456, "mobilellm_ls_125m": 124_635_456, "mobilellm_350m": 345_355_200,
    "mobilellm_ls_350m": 345_355_200, "mobilellm_600m": 603_188_352, "mobilellm_1b": 1_005_461_760,
    "mobilellm_1_5b": 1_511_188_800, "mobilemoe_s": 1_263_373_056, "mobilemoe_m": 2_818_388_992, "mobilemoe_l": 5_325_702_400,
    "mobilellm_r1_140m": 140_248_512, "mobilellm_r1_360m": 359_431_168,
    "mobilellm_r1_950m": 949_685_760, "mobilellm_pro_1b": 1_084_453_120,
}  # fmt: skip


def build(config: ModelConfig) -> Decoder:
    model = Decoder(config)
    init_weights(model, 0)
    return model.eval()


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(TINY.vocab_size, shape, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize(("name", "count"), PUBLISHED.items())
def test_a_family_has_its_published_count_of_parameters(name: str, count: int) -> None:
    assert family(name).num_params() == count


@pytest.mark.parametrize("name", FAMILIES)
def test_the_built_module_has_the_parameters_and_bytes_that_the_config_says(name: str) -> None:
    config = FAMILIES[name]
    with torch.device("meta"):
        model = Decoder(config)
    counts = {parameter_name: parameter.numel() for parameter_name, parameter in model.named_parameters()}
    experts = sum(count for parameter_name, count in counts.items() if ".experts." in parameter_name)
    idle = 0 if config.moe is None else experts * (config.moe.num_experts - config.moe.top_k) // config.moe.num_experts
    assert sum(counts.values()) == config.num_params() == config.num_active_params() + idle
    assert config.weight_bytes(16) == 2 * config.num_params()
    whole = sum(count for parameter_name, count in counts.items() if "norm" in parameter_name or "router" in parameter_name)
    matrices = config.num_params() - whole
    assert config.weight_bytes(4, 32) == matrices // 2 + matrices // 32 * 2 + 4 * whole


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("training", [False, True], ids=["forward", "training"])
def test_flops_a_token_are_those_that_torch_counts(config: ModelConfig, training: bool) -> None:
    length = 8
    model = build(replace(config, window=length))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # the fused kernel is not counted
        logits = model(tokens(1, length))
        if training:
            logits.sum().backward()
    # torch counts the whole T x T square of scores, so every token attends to T.
    said = length * replace(config, window=length).flops_per_token(length, training=training)
    assert counter.get_total_flops() == pytest.approx(said, rel=0.001)


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_the_cache_holds_the_bytes_that_the_config_says(config: ModelConfig) -> None:
    full = replace(config, window=1000)
    cache = KVCache(full, 1, 16)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers if layer is not None)
    assert held == full.kv_bytes(16, bits=32)
    assert config.kv_bytes(16) <= full.kv_bytes(16)


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_cached_steps_give_the_logits_of_one_pass(config: ModelConfig) -> None:
    model, ids = build(config), tokens(2, 14)
    cache = KVCache(config, 2, 14)
    with torch.no_grad():
        parts = [model(ids[:, :6], cache=cache), *(model(ids[:, i : i + 1], cache=cache) for i in range(6, 14))]
        torch.testing.assert_close(torch.cat(parts, 1), model(ids), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_a_packed_document_is_as_if_alone(config: ModelConfig) -> None:
    model, ids = build(config), tokens(1, 15)
    positions = torch.cat([torch.arange(n) for n in (4, 9, 2)])[None]
    with torch.no_grad():
        packed = model(ids, positions)
        for start, end in ((0, 4), (4, 13), (13, 15)):
            torch.testing.assert_close(packed[:, start:end], model(ids[:, start:end]), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_no_token_sees_a_later_one(config: ModelConfig) -> None:
    model, ids = build(config), tokens(1, 12)
    other = ids.clone()
    other[0, 7:] = (other[0, 7:] + 1) % config.vocab_size
    with torch.no_grad():
        same, whole = model(ids)[:, :7], config.moe is None
        # Experts share products with other tokens; how many rows a product has decides how it rounds.
        torch.testing.assert_close(same, model(other)[:, :7], atol=0 if whole else 1e-5, rtol=0 if whole else 1e-5)


def test_a_window_layer_forgets_what_is_outside_it() -> None:
    config = replace(TINY, num_layers=1, attention=("window",))
    model, ids = build(config), tokens(1, 12)
    other = ids.clone()
    other[0, 0] = (other[0, 0] + 1) % config.vocab_size
    with torch.no_grad():
        difference = (model(ids) - model(other)).abs().amax(-1)[0]
    assert (difference[: config.window] > 0).all() and (difference[config.window :] == 0).all()


@pytest.mark.parametrize(("length", "past"), [(96, 0), (300, 0), (200, 33)])
def test_a_long_row_attended_in_pieces_is_the_row_attended_whole(length: int, past: int) -> None:
    generator = torch.Generator().manual_seed(length)
    q = torch.randn(2, 4, length, 8, generator=generator, requires_grad=True)
    k, v = (torch.randn(2, 2, past + length, 8, generator=generator, requires_grad=True) for _ in "kv")
    causal = torch.ones(length, past + length, dtype=torch.bool).tril(past)
    mask = causal & (torch.rand(2, 1, length, past + length, generator=generator) < 0.7)
    mask |= torch.eye(length, past + length, dtype=torch.bool).roll(past, -1)  # every token sees itself
    weight = torch.randn(2, 4, length, 8, generator=generator)

    results = []
    for function in (attend, partial(F.scaled_dot_product_attention, enable_gqa=True)):
        out = function(q, k, v, mask)
        results.append([out, *torch.autograd.grad((out * weight).sum(), (q, k, v))])
    for ours, whole in zip(*results, strict=True):
        torch.testing.assert_close(ours, whole, atol=1e-5, rtol=1e-5)


def test_attention_is_the_textbooks() -> None:
    """One layer by hand: RoPE as complex numbers, softmax(q k / sqrt(d)) v, head by head, no library attention."""
    config = replace(TINY, num_layers=1)
    model, ids = build(config), tokens(1, 9)
    block = model.blocks[0]
    with torch.no_grad():
        x = model.embed(ids)
        h = F.rms_norm(x, (config.hidden_size,), eps=config.norm_eps)[0]
        half = config.head_dim // 2
        angle = torch.arange(9)[:, None] * config.rope_theta ** (-torch.arange(half) / half)[None]
        turn = torch.polar(torch.ones_like(angle), angle)

        def turned(weight: torch.Tensor, head: int) -> torch.Tensor:
            part = h @ weight[head * config.head_dim : (head + 1) * config.head_dim].T
            rotated = torch.complex(part[:, :half], part[:, half:]) * turn
            return torch.cat((rotated.real, rotated.imag), -1)

        heads = []
        for head in range(config.num_heads):
            shared = head // (config.num_heads // config.num_kv_heads)
            q, k = turned(block.attention.q.weight, head), turned(block.attention.k.weight, shared)
            v = h @ block.attention.v.weight[shared * config.head_dim : (shared + 1) * config.head_dim].T
            scores = (q @ k.T / config.head_dim**0.5).masked_fill(torch.ones(9, 9).triu(1).bool(), float("-inf"))
            heads.append(scores.softmax(-1) @ v)
        y = x[0] + torch.cat(heads, -1) @ block.attention.o.weight.T
        h = F.rms_norm(y, (config.hidden_size,), eps=config.norm_eps)
        ffn = block.feed_forward
        y = y + (F.silu(h @ ffn.gate.weight.T) * (h @ ffn.up.weight.T)) @ ffn.down.weight.T
        logits = F.rms_norm(y, (config.hidden_size,), eps=config.norm_eps) @ model.embed.weight.T
        torch.testing.assert_close(model(ids)[0], logits, atol=1e-4, rtol=1e-4)


def test_initial_weights_depend_on_seed_and_name_only() -> None:
    small, deep = build(TINY), build(replace(TINY, num_layers=5, tie_embeddings=False))
    assert torch.equal(small.blocks[0].attention.q.weight, deep.blocks[0].attention.q.weight)
    assert not torch.equal(small.blocks[0].attention.q.weight, small.blocks[1].attention.q.weight)
    other = Decoder(TINY)
    init_weights(other, 1)
    assert not torch.equal(small.embed.weight, other.embed.weight)
    assert small.embed.weight.std().item() == pytest.approx(TINY.init_std, rel=0.1)
    assert small.blocks[0].feed_forward.down.weight.std().item() == pytest.approx(TINY.init_std / 8**0.5, rel=0.1)


def test_generation_is_greedy_or_seeded_and_stops() -> None:
    model = build(TINY)
    greedy = list(generate(model, [1, 2, 3], 6))
    ids = [1, 2, 3]
    for token in greedy:  # without a cache
        assert int(model(torch.tensor([ids]))[0, -1].argmax()) == token
        ids.append(token)
    assert list(generate(model, [1, 2, 3], 6, stop_ids=[greedy[2]])) == greedy[: greedy.index(greedy[2])]
    hot = dict(temperature=1.5, seed=4)
    assert list(generate(model, [1], 8, **hot)) == list(generate(model, [1], 8, **hot))
    assert list(generate(model, [1], 8, **hot)) != list(generate(model, [1], 8, temperature=1.5, seed=5))


@pytest.mark.parametrize("shape", [(7,), (1, 1, 7), (3, 5, 33)])
def test_the_fast_norm_is_torchs_forward_and_backward(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(9)
    size = shape[-1]
    x = torch.randn(shape, generator=generator) * torch.logspace(-4, 3, size)  # from far below eps to far above
    grad = torch.randn(shape, generator=generator)
    norm = RMSNorm(size, 1e-5)
    norm.weight.data.copy_(torch.rand(size, generator=generator) + 0.5)
    found, wanted = [], []
    for call, into in ((norm, found), (lambda x: F.rms_norm(x, (size,), norm.weight, 1e-5), wanted)):
        inputs = x.clone().requires_grad_()
        norm.weight.grad = None
        y = call(inputs)
        y.backward(grad)
        into += [y.detach(), inputs.grad, norm.weight.grad]
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=2e-5)


def test_top_p_never_takes_what_lies_beyond_it() -> None:
    logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05]))
    generator = torch.Generator().manual_seed(0)
    assert {sample(logits, 1.0, 0.7, generator) for _ in range(200)} == {0, 1}
    assert {sample(logits, 1.0, 0.1, generator) for _ in range(20)} == {0}


def test_wrong_shapes_are_told() -> None:
    with pytest.raises(ValueError, match="num_heads=4.*num_kv_heads=3"):
        replace(TINY, num_kv_heads=3)
    with pytest.raises(ValueError, match="attention names 1 layers"):
        replace(TINY, attention=("full",))
    with pytest.raises(ValueError, match="cache holds 4"):
        build(TINY)(tokens(1, 5), cache=KVCache(TINY, 1, 4))
    with pytest.raises(ValueError, match="did you mean 'mobilellm_125m'"):
        family("mobillm_125m")


@pytest.mark.parametrize("temperature", [1e-3, 1e-40, 5e-324])
def test_a_tiny_temperature_tends_to_the_likeliest_token(temperature):
    logits = torch.tensor([1.0, 50.0, 49.0])
    assert sample(logits, temperature, 1.0, torch.Generator().manual_seed(0)) == 1
