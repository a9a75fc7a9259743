"""Experts of four bits: rows through Triton's kernels against plain torch, integers exactly."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import kernels.triton as kt
from kernels.triton import reference
from kernels.triton.blocks import Blocks
from kernels.triton.packed import PackedExperts, dequantize_experts, pack_experts, unpack_experts
from quant.primitives import dequantize, group_scales, quantize, quantize_activations
from quant.spec import QuantSpec
from tests.helpers.triton_inputs import TYPES, assert_rounded, draw, draw_experts, draw_ids

BLOCKS = Blocks(rows=32, cols=128, depth=64)
WIDE = {"outputs": 128, "pairs": 4, "inputs": 64}
"""Of MatvecBlocks, whose module needs triton."""
COUNTS = [5, 0, 40, 22]
AXES = ["input", "output"]
SIZES = [(96, 160), (128, 64), (32, 32)]  # of pairs of groups: odd, whole, half a one
CASES = [*((size, dtype) for size in SIZES for dtype in (torch.float32, torch.int8)),
         (SIZES[0], torch.float16), (SIZES[0], torch.bfloat16)]  # fmt: skip


def rows_of(count: int, length: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Rows and, of INT8 ones, their scales."""
    x = draw(count, length, device=device)
    return kt.quantize_rows(x, block=64) if dtype == torch.int8 else (x.to(dtype), None)


def through(x: Tensor, scales: Tensor | None, weight: PackedExperts, expert: int) -> Tensor:
    """fp32 [R, N] by the reference, on the CPU."""
    x, weight = x.cpu(), weight.to("cpu")
    if scales is None:
        return reference.linear_w4a16(x, weight, expert)
    linear = reference.linear_w4a8 if weight.axis == "input" else reference.linear_rounded
    return linear(x, scales.cpu(), weight, expert)


def test_packing_is_undone_by_unpacking():
    for axis in AXES:
        for inputs, outputs in SIZES:
            weight = draw_experts(2, inputs, outputs, axis)
            codes, scales = unpack_experts(weight)
            again = pack_experts(codes, scales, axis)
            assert torch.equal(again.codes, weight.codes) and torch.equal(again.scales, weight.scales)
            assert (weight.inputs, weight.outputs) == (inputs, outputs)
            assert dequantize_experts(weight).shape == (2, inputs, outputs)
            assert codes.min() == -8 and codes.max() == 7


def test_groups_along_the_input_are_those_of_quantization():
    spec = QuantSpec()
    weight = draw(3, 64, 96)  # [E, out, in], as the linears of a model
    scales = torch.stack([group_scales(expert, spec) for expert in weight])
    codes = torch.stack([quantize(expert, s, spec) for expert, s in zip(weight, scales, strict=True)])
    packed = pack_experts(codes, scales, "input")
    want = torch.stack([dequantize(c, s, spec) for c, s in zip(codes, scales, strict=True)])
    assert torch.equal(dequantize_experts(packed), want.transpose(1, 2))


def test_a_byte_holds_the_same_place_of_two_groups():
    codes = torch.arange(128).remainder(16).sub(8).to(torch.int8).view(1, 1, 128)
    packed = pack_experts(codes, torch.ones(1, 1, 4).half(), "input").codes[0, 0]
    for i in (0, 7, 31):
        assert packed[i] & 15 == codes[0, 0, i] + 8 and packed[i] >> 4 == codes[0, 0, 32 + i] + 8
        assert packed[32 + i] & 15 == codes[0, 0, 64 + i] + 8


def test_what_cannot_be_packed_is_refused():
    codes, scales = torch.zeros(2, 4, 64, dtype=torch.int8), torch.zeros(2, 4, 2).half()
    for wrong, why in ((codes[..., :48], "rows of a multiple of 32"), (codes + 8, "codes from 8 to 8; expected -8 to 7")):
        with pytest.raises(ValueError, match=why):
            pack_experts(wrong, scales, "input")
    with pytest.raises(ValueError, match="axis='rows'"):
        pack_experts(codes, scales, "rows")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="fp16"):
        pack_experts(codes, scales.float(), "input")


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("length", [1, 33, 768])
def test_rows_are_rounded_as_training_rounds_them(device, length, dtype):
    x = draw(40, length, dtype=dtype, device=device) * torch.logspace(-6, 3, 40, device=device)[:, None].to(dtype)
    x[3] = 0.0
    codes, scales = kt.quantize_rows(x, block=64)
    want_codes, want_scales = quantize_activations(x.cpu())
    assert torch.equal(codes.cpu(), want_codes) and torch.equal(scales.cpu(), want_scales.squeeze(-1))
    theirs = reference.quantize_rows(x.cpu())
    assert torch.equal(theirs[0], want_codes) and torch.equal(theirs[1], want_scales.squeeze(-1))


def test_halves_are_rounded_to_even_and_a_broken_row_stays_one(device):
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5], [1.0, float("nan"), 3.0, 0, 0, 0, 0]], device=device)
    codes, scales = kt.quantize_rows(x)
    assert codes[0].tolist() == [127, 0, 2, 2, 0, -2, -2]
    assert scales[0] == 1.0 and scales[1].isnan() and (codes[1] == 0).all()


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_swiglu_alone_and_with_rounding(device, dtype):
    gate_up = 3 * draw(40, 2 * 48, dtype=dtype, device=device)
    hidden = kt.swiglu_rows(gate_up, block=64)
    assert hidden.dtype == dtype
    assert_rounded(hidden, reference.swiglu_rows(gate_up.cpu()), dtype)
    fused, apart = kt.swiglu_quantize_rows(gate_up, block=64), kt.quantize_rows(hidden, block=64)
    assert torch.equal(fused[0], apart[0]) and torch.equal(fused[1], apart[1])


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize(("size", "dtype"), CASES, ids=str)
def test_sorted_rows_go_through_their_experts(device, size, axis, dtype):
    weight = draw_experts(4, *size, axis)
    x, scales = rows_of(70, size[0], dtype, device)
    counts = torch.tensor(COUNTS, device=device)
    got = kt.grouped_w4(x, weight.to(device), counts, scales=scales, dtype=torch.float32, blocks=BLOCKS)
    parts = [slice(sum(COUNTS[:e]), sum(COUNTS[: e + 1])) for e in range(4)]
    want = torch.cat([through(x[at], None if scales is None else scales[at], weight, e) for e, at in enumerate(parts)])
    # fp32 sums of weights rounded to the type, which both sides do; along the output INT8 rows meet weights of fp16.
    rounding = torch.float16 if dtype == torch.int8 and axis == "output" else torch.float32
    assert_rounded(got[:67], want, rounding, ulps=4.0)
    assert (got[67:] == 0).all()


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize(("size", "dtype"), CASES, ids=str)
def test_pairs_go_through_their_experts(device, size, axis, dtype):
    weight = draw_experts(4, *size, axis)
    experts = torch.tensor([2, 0, 3, 3, 1, 9], device=device)  # two a row; the last is nobody's
    x, scales = rows_of(3, size[0], dtype, device)
    got = kt.matvec_w4(x, weight.to(device), experts, scales=scales, dtype=torch.float32, blocks=kt.MatvecBlocks(**WIDE))
    exact = x.float() if scales is None else x  # this path rounds no weight
    want = torch.cat([
        through(exact[p // 2 : p // 2 + 1], None if scales is None else scales[p // 2 : p // 2 + 1], weight, int(experts[p]))
        for p in range(5)
    ])  # fmt: skip
    assert_rounded(got[:5], want, torch.float32, ulps=4.0)
    assert (got[5] == 0).all()


@pytest.mark.parametrize("path", ["tiles", "pairs"])
def test_integers_are_exact(device, path):
    """Scales of powers of two make every sum of groups one that fp32 holds, whatever the order: no bit may differ."""
    scales = torch.tensor([1.0, 0.5, 2.0, 0.25, 4.0, 0.125, 1.0]).half()
    weight = draw_experts(3, 224, 96, "input", scales=scales)
    x = (draw_ids(48, 224, below=255) - 127).to(torch.int8)
    x[:, 0] = 127
    codes, _ = unpack_experts(weight)
    counts = [16, 0, 32]
    ids = torch.repeat_interleave(torch.arange(3), torch.tensor(counts))
    sums = torch.stack([reference.group_sums(x[r : r + 1], codes[ids[r]])[0] for r in range(48)])
    want = (sums.double() * scales.double()).sum(-1)
    assert want.abs().max() > 20_000  # far beyond what fp16 or bf16 would carry through
    ones, device_weight = torch.ones(48, device=device), weight.to(device)
    if path == "tiles":
        got = kt.grouped_w4(x.to(device), device_weight, torch.tensor(counts, device=device), scales=ones, blocks=BLOCKS)
    else:
        got = kt.matvec_w4(x.to(device), device_weight, ids.to(device), scales=ones, blocks=kt.MatvecBlocks(**WIDE))
    assert got.dtype == torch.float32 and torch.equal(got.cpu().double(), want)


def test_rows_are_read_through_an_index(device):
    weight, counts = draw_experts(2, 64, 64, "input").to(device), torch.tensor([3, 4], device=device)
    x = draw(5, 64, device=device)
    index = torch.tensor([4, 0, 0, 1, 5, 2, 4], device=device)  # 5 is no row: zeros
    got = kt.grouped_w4(x, weight, counts, index=index, blocks=BLOCKS)
    copied = torch.cat([x, torch.zeros(1, 64, device=device)])[index]
    assert torch.equal(got, kt.grouped_w4(copied, weight, counts, blocks=BLOCKS)) and (got[4] == 0).all()


def test_wrong_rows_are_refused(interpreter):
    weight, counts = draw_experts(2, 64, 64, "input"), torch.tensor([1, 2])
    with pytest.raises(ValueError, match=r"rows \[3, 32\]; expected \[R, 64\]"):
        kt.grouped_w4(draw(3, 32), weight, counts)
    with pytest.raises(ValueError, match="rows are torch.int8 with no scales"):
        kt.grouped_w4(draw(3, 64).to(torch.int8), weight, counts)
    with pytest.raises(ValueError, match="rows are torch.float32 with scales"):
        kt.matvec_w4(draw(3, 64), weight, torch.tensor([0, 1, 0]), scales=torch.ones(3))
    with pytest.raises(ValueError, match="4 pairs cannot be shared equally by 3 rows"):
        kt.matvec_w4(draw(3, 64), weight, torch.tensor([0, 1, 0, 1]))


@pytest.mark.parametrize("int8", [False, True], ids=["W4A16", "W4A8"])
@pytest.mark.parametrize("path", ["decode", "prefill"])
@pytest.mark.parametrize("axis", AXES)
def test_a_layer_of_experts_is_the_sum_over_each_tokens_choices(device, axis, path, int8):
    gate_up, down = draw_experts(6, 96, 128, axis), draw_experts(6, 64, 96, axis, seed=7)
    x, mix, experts = draw(9, 96, seed=3), draw(9, 2, seed=4).sigmoid(), draw_ids(9, 2, below=5, seed=5)
    layer = kt.moe_w4a8 if int8 else kt.moe_w4a16
    got = layer(*(t.to(device) for t in (x, experts, mix, gate_up, down)), path=path,
                blocks=kt.MoeBlocks(grouped=BLOCKS, matvec=kt.MatvecBlocks(**WIDE), rows=32))  # fmt: skip
    want = reference.moe(x, experts, mix, gate_up, down, int8=int8)
    if not int8:
        assert_rounded(got, want, torch.float32, ulps=8.0)
    else:
        # A sum that is one bit off may tip a code of the hidden row to its neighbour: one step of 127.
        assert (got.cpu() - want).abs().max() < 0.01 * want.abs().max()


def test_a_layer_keeps_the_type_of_its_rows_and_picks_its_path(device):
    gate_up, down = draw_experts(4, 64, 64, "output").to(device), draw_experts(4, 32, 64, "output").to(device)
    for tokens in (2, 40):
        x = draw(tokens, 64, dtype=torch.bfloat16, device=device)
        experts, mix = draw_ids(tokens, 2, below=4, device=device), torch.ones(tokens, 2, device=device)
        got = kt.moe_w4a16(x, experts, mix, gate_up, down)
        assert got.dtype == torch.bfloat16
        want = reference.moe(x.cpu(), experts.cpu(), mix.cpu(), gate_up.to("cpu"), down.to("cpu"), int8=False)
        assert_rounded(got, want, torch.bfloat16, ulps=3.0)
    with pytest.raises(ValueError, match="expected E x D -> 2 F and E x F -> D"):
        kt.moe_w4a16(x, experts, mix, down, gate_up)
