"""A spec on a model: same parameters, exact grid, straight-through gradients, sharding and compiling."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from modeling.config import ModelConfig
from modeling.decoder import Decoder
from modeling.init import init_weights
from modeling.layers import Embedding, Linear
from modeling.moe_config import MoEConfig
from quant.apply import FakeQuantEmbedding, FakeQuantLinear, bake, convert, freeze, prepare, quantized_weights
from quant.methods.minmax import fake_quantize_activations, fake_quantize_weight
from quant.primitives import QuantError, dequantize, round_activations, round_to_grid
from quant.spec import QuantSpec

SPEC = QuantSpec(group_size=16)
WEIGHTS_ONLY = replace(SPEC, activation_bits=16)


class Tiny(nn.Module):
    """An embedding, two linears, a norm, and the table again as head: what a tied decoder is made of."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.embed = Embedding(20, 32)
        self.up, self.down = Linear(32, 64), Linear(64, 32)
        self.norm = nn.RMSNorm(32)
        generator = torch.Generator().manual_seed(seed)
        for parameter in (self.embed.weight, self.up.weight, self.down.weight):
            parameter.data.normal_(std=0.3, generator=generator)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(ids)
        hidden = self.norm(hidden + self.down(F.silu(self.up(hidden))))
        x, weight = self.embed.head_operands(hidden)
        return x @ weight.T


IDS = torch.arange(12).view(2, 6)


def test_preparing_keeps_parameters_names_and_modules() -> None:
    model = Tiny()
    names, parameters, modules = list(model.state_dict()), dict(model.named_parameters()), list(model.modules())
    prepare(model, SPEC)
    assert list(model.state_dict()) == names
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert all(new is old for new, old in zip(model.modules(), modules, strict=True))
    assert isinstance(model.up, FakeQuantLinear) and isinstance(model.embed, FakeQuantEmbedding)
    assert type(model.norm) is nn.RMSNorm


def test_the_prepared_model_computes_with_the_converted_integers_exactly() -> None:
    for seed in range(20):
        model = prepare(Tiny(seed), WEIGHTS_ONLY)
        plain = Tiny()
        converted = convert(model)
        assert set(converted) == {"embed.weight", "up.weight", "down.weight"}
        plain.load_state_dict(
            {name: dequantize(codes, scales, SPEC) for name, (codes, scales) in converted.items()}
            | {"norm.weight": model.norm.weight.detach()}
        )
        assert torch.equal(plain(IDS), model(IDS))


def test_the_baked_state_is_the_converted_one_and_loads_into_a_plain_model() -> None:
    model = prepare(Tiny(), WEIGHTS_ONLY)
    state = bake(model)
    codes, scales = convert(model)["up.weight"]
    assert torch.equal(state["up.weight"], dequantize(codes, scales, SPEC))
    assert all(len(group.unique()) <= 16 for group in state["down.weight"].view(-1, 16))
    plain = Tiny(1)
    plain.load_state_dict(state)
    assert torch.equal(plain(IDS), model(IDS))


def test_activations_are_rounded_before_every_linear_and_the_tied_head() -> None:
    model = prepare(Tiny(), SPEC)
    weight = round_to_grid(model.up.weight, SPEC)
    x = torch.randn(3, 32)
    assert torch.equal(model.up(x), F.linear(round_activations(x), weight))
    hidden, table = model.embed.head_operands(x)
    assert torch.equal(hidden, round_activations(x))
    assert torch.equal(table, round_to_grid(model.embed.weight, SPEC))
    assert torch.equal(model.embed(IDS), table[IDS])


def test_gradients_pass_straight_through_also_at_the_clamped_end() -> None:
    weight = torch.randn(4, 32, requires_grad=True)
    given = torch.randn(4, 32)
    fake_quantize_weight(weight, SPEC).backward(given)
    assert torch.equal(weight.grad, given)
    x = torch.randn(2, 3, 32, requires_grad=True)
    fake_quantize_activations(x, SPEC).backward(torch.ones_like(x))
    assert torch.equal(x.grad, torch.ones_like(x))


def test_a_linear_sends_the_gradient_of_its_rounded_operands() -> None:
    model = prepare(Tiny(), SPEC)
    x = torch.randn(5, 32, requires_grad=True)
    given = torch.randn(5, 64)
    model.up(x).backward(given)
    torch.testing.assert_close(model.up.weight.grad, given.T @ round_activations(x))
    torch.testing.assert_close(x.grad, given @ round_to_grid(model.up.weight, SPEC))


def test_an_embedding_may_be_left_alone() -> None:
    model = prepare(Tiny(), replace(SPEC, embedding=False))
    assert type(model.embed) is Embedding
    assert set(quantized_weights(model)) == {"up.weight", "down.weight"}


def test_preparing_twice_is_the_same_and_with_another_spec_refused() -> None:
    model = prepare(prepare(Tiny(), SPEC), SPEC)
    with pytest.raises(QuantError, match="embed is prepared with"):
        prepare(model, replace(SPEC, weight_bits=8))


def test_rows_that_groups_do_not_fill_are_refused_before_anything_changes() -> None:
    model = Tiny()
    with pytest.raises(QuantError, match="group_size=24"):
        prepare(model, QuantSpec(group_size=24))
    assert type(model.up) is Linear and type(model.embed) is Embedding


def test_a_model_without_linears_or_not_prepared_or_not_finite_is_refused() -> None:
    with pytest.raises(QuantError, match="no linear"):
        prepare(nn.Sequential(nn.Linear(4, 4)), SPEC)
    with pytest.raises(QuantError, match="not prepared"):
        convert(Tiny())
    model = prepare(Tiny(), SPEC)
    model.up.weight.data[0, 0] = torch.nan
    with pytest.raises(QuantError, match=r"up\.weight holds NaN"):
        convert(model)


def test_a_frozen_model_gives_the_same_numbers_and_cannot_be_converted_again() -> None:
    model = prepare(Tiny(), SPEC)
    expected, state = model(IDS), bake(model)
    freeze(model)
    assert torch.equal(model(IDS), expected)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(QuantError, match="frozen"):
        convert(model)


def test_preparing_works_before_there_are_weights() -> None:
    model = prepare(Tiny().to("meta"), SPEC).to_empty(device="cpu")
    model.load_state_dict(Tiny().state_dict())
    assert torch.equal(model(IDS), prepare(Tiny(), SPEC)(IDS))


def test_the_compiled_model_gives_the_same_numbers_and_gradients() -> None:
    model = prepare(Tiny(), SPEC)
    expected = model(IDS)
    expected.square().sum().backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)(IDS)
    compiled.square().sum().backward()
    torch.testing.assert_close(compiled, expected, rtol=0, atol=0)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name])


def test_a_sharded_model_rounds_as_a_whole_one_does() -> None:
    """One rank, in this process: FSDP gathers whole rows before a forward pass, whatever the number of ranks."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    try:
        model = prepare(Tiny(), SPEC)
        for module in (model.up, model.down, model):
            fully_shard(module)
        logits = model(IDS)
        logits.square().sum().backward()
        plain = prepare(Tiny(), SPEC)
        expected = plain(IDS)
        expected.square().sum().backward()
        torch.testing.assert_close(logits, expected, rtol=0, atol=0)
        for (name, parameter), reference in zip(model.named_parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(parameter.grad.full_tensor(), reference.grad, msg=name)
    finally:
        dist.destroy_process_group()


MOE = ModelConfig(
    vocab_size=20, hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=16, ffn_size=64, max_positions=16,
    init_std=0.3, moe=MoEConfig(num_experts=4, top_k=2, expert_size=16, shared_size=32),
)  # fmt: skip


def mixture(seed: int = 0) -> Decoder:
    model = Decoder(MOE)
    init_weights(model, seed)
    return model


@pytest.mark.parametrize("axis", ["input", "output"])
def test_experts_are_rounded_in_groups_along_the_axis_that_is_asked_for(axis: str) -> None:
    spec = replace(SPEC, expert_axis=axis)
    model = prepare(mixture(), spec)
    plain = mixture().blocks[0].feed_forward.experts
    converted = convert(model)
    for name in ("gate_up", "down"):
        weight = getattr(plain, name).detach()
        codes, scales = converted[f"blocks.0.feed_forward.experts.{name}"]
        for expert in range(4):  # each is a matrix of its own, [out, in] or [in, out]
            lanes = weight[expert].T if axis == "input" else weight[expert]
            wanted = round_to_grid(lanes.contiguous(), spec)
            assert torch.equal(dequantize(codes[expert], scales[expert], spec), wanted)


@pytest.mark.parametrize("axis", ["input", "output"])
def test_a_prepared_mixture_computes_with_its_integers_and_leaves_the_router_alone(axis: str) -> None:
    spec = replace(WEIGHTS_ONLY, expert_axis=axis)
    model, baked = prepare(mixture(), spec), Decoder(MOE)
    baked.load_state_dict(bake(model))
    router = "blocks.1.feed_forward.router.weight"
    assert router not in convert(model) and torch.equal(baked.get_parameter(router), mixture().get_parameter(router))
    torch.testing.assert_close(model(IDS), baked(IDS), atol=1e-5, rtol=1e-5)
    assert not torch.equal(model(IDS), mixture()(IDS))
    before = model(IDS)
    torch.testing.assert_close(freeze(model)(IDS), before, atol=1e-5, rtol=1e-5)


def test_the_inputs_of_experts_are_rounded_and_gradients_pass_straight_through() -> None:
    model = prepare(mixture(), SPEC)
    experts = model.blocks[0].feed_forward.experts
    rows = torch.randn(6, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
    counts = torch.tensor([1, 0, 3, 2])
    weights = {name: round_to_grid(value.detach().transpose(1, 2), SPEC).transpose(1, 2).requires_grad_()
               for name, value in experts.named_parameters()}  # fmt: skip
    x = round_activations(rows.detach()).requires_grad_()
    out = []
    for expert, part in enumerate(x.split(counts.tolist())):
        gate, up = (part @ weights["gate_up"][expert]).chunk(2, -1)
        hidden = F.silu(gate) * up
        out.append(hidden + (round_activations(hidden) - hidden).detach())
    want = torch.cat([h @ weights["down"][expert] for expert, h in enumerate(out)])
    got = experts(rows, counts)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    wanted = torch.autograd.grad(want.square().sum(), [x, *weights.values()])
    mine = torch.autograd.grad(got.square().sum(), [rows, *(getattr(experts, name) for name in weights)])
    for one, other in zip(mine, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_experts_whose_groups_do_not_fit_are_refused() -> None:
    config = replace(MOE, moe=replace(MOE.moe, expert_size=24))
    with pytest.raises(QuantError, match=r"experts.down has rows of 24 weights, which quant.group_size=16 does not divide"):
        prepare(Decoder(config), SPEC)
    prepare(Decoder(config), replace(SPEC, expert_axis="output"))
