"""The arithmetic: codes, scales, their borders, and torchao as a peer."""

from __future__ import annotations

import pytest
import torch

from quant.primitives import (
    QuantError,
    check_groups,
    dequantize,
    group_scales,
    quantize,
    quantize_activations,
    round_activations,
    round_to_grid,
)
from quant.spec import QuantSpec

SPEC = QuantSpec()
SPECS = [QuantSpec(weight_bits=bits, group_size=group) for bits in (4, 8) for group in (16, 32)]


def random_weight(seed: int, rows: int = 24, columns: int = 96) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    magnitudes = 10.0 ** torch.randint(-4, 2, (rows, 1), generator=generator)
    return torch.randn(rows, columns, generator=generator) * magnitudes


def slow_codes(weight: torch.Tensor, spec: QuantSpec) -> tuple[list[int], list[float]]:
    """The rule of MobileMoE, one weight at a time in Python."""
    codes, scales = [], []
    for row in weight.tolist():
        for start in range(0, len(row), spec.group_size):
            group = torch.tensor(row[start : start + spec.group_size])
            scale = torch.tensor(group.abs().max() * (2.0 / (2**spec.weight_bits - 1))).half().float()
            scales.append(scale.item())
            half = 2 ** (spec.weight_bits - 1)
            codes += [max(-half, min(half - 1, round((value / scale).item()))) if scale else 0 for value in group]
    return codes, scales


@pytest.mark.filterwarnings("ignore:To copy construct")
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_codes_and_scales_are_those_of_the_rule_applied_one_weight_at_a_time(spec: QuantSpec) -> None:
    weight = random_weight(1, rows=4)
    codes, scales = slow_codes(weight, spec)
    found = group_scales(weight, spec)
    assert found.dtype == torch.float16
    assert found.float().flatten().tolist() == scales
    assert quantize(weight, found, spec).flatten().tolist() == codes


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_in_training_equals_the_packed_integers_bit_for_bit(spec: QuantSpec, dtype: torch.dtype) -> None:
    for seed in range(50):
        weight = random_weight(seed).to(dtype)
        scales = group_scales(weight, spec)
        stored = dequantize(quantize(weight, scales, spec), scales, spec)
        assert torch.equal(round_to_grid(weight, spec), stored)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_quantizing_what_lies_on_the_grid_changes_nothing(spec: QuantSpec) -> None:
    weight = random_weight(2)
    scales = group_scales(weight, spec)
    codes = quantize(weight, scales, spec)
    assert torch.equal(quantize(dequantize(codes, scales, spec), scales, spec), codes)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_an_error_is_at_most_half_a_step_but_for_the_clamped_top(spec: QuantSpec) -> None:
    weight = torch.randn(24, 96, generator=torch.Generator().manual_seed(3))
    step = group_scales(weight, spec).float().repeat_interleave(spec.group_size, dim=1)
    top = weight / step > 2 ** (spec.weight_bits - 1) - 1
    error = (round_to_grid(weight, spec) - weight).abs() / step
    assert top.any()
    assert error[~top].max() <= 0.5 + 1e-5
    assert error.max() <= 1.0


def test_the_largest_positive_weight_is_clamped_to_7_and_the_largest_negative_reaches_minus_8() -> None:
    weight = torch.zeros(2, 32)
    weight[0, 0], weight[1, 0] = 7.5, -7.5
    scales = group_scales(weight, SPEC)
    assert scales.flatten().tolist() == [1.0, 1.0]
    assert quantize(weight, scales, SPEC)[:, 0].tolist() == [7, -8]


def test_ties_go_to_the_even_code() -> None:
    weight = torch.zeros(1, 32)
    weight[0, :6] = torch.tensor([7.5, 0.5, 1.5, 2.5, -0.5, -1.5])
    assert quantize(weight, group_scales(weight, SPEC), SPEC)[0, 1:6].tolist() == [0, 2, 2, 0, -2]


@pytest.mark.parametrize("value", [0.0, 1e-9, 1e-40])
def test_a_group_of_zeros_or_below_fp16_becomes_zeros_without_nan(value: float) -> None:
    weight = torch.full((2, 64), value)
    weight[1] = 1.0
    scales = group_scales(weight, SPEC)
    assert scales[0].tolist() == [0.0, 0.0]
    assert quantize(weight, scales, SPEC)[0].abs().max() == 0
    assert round_to_grid(weight, SPEC)[0].abs().max() == 0
    assert torch.isfinite(round_to_grid(weight, SPEC)).all()


def test_a_scale_above_fp16_saturates_instead_of_becoming_infinite() -> None:
    weight = torch.full((1, 32), 1e7)
    assert group_scales(weight, SPEC).item() == 65504
    assert round_to_grid(weight, SPEC).max() == 7 * 65504


def test_a_group_that_does_not_fill_the_row_is_refused_by_name() -> None:
    with pytest.raises(QuantError, match=r"blocks.0.up has rows of 48 .*group_size=32"):
        check_groups("blocks.0.up", 48, SPEC)


def test_activations_get_one_symmetric_scale_a_token_so_the_batch_does_not_matter() -> None:
    x = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0))
    codes, scales = quantize_activations(x)
    assert codes.dtype == torch.int8 and scales.shape == (3, 5, 1)
    assert codes.abs().amax(dim=-1).eq(127).all()
    alone, _ = quantize_activations(x[1:2, 3:4])
    assert torch.equal(alone, codes[1:2, 3:4])
    assert torch.equal(quantize_activations(-x)[0], -codes)
    assert torch.equal(round_activations(x), codes * scales)
    assert ((round_activations(x) - x).abs() <= scales * 0.5001).all()


def test_a_token_of_zeros_stays_zero() -> None:
    x = torch.zeros(2, 8)
    x[1, 0] = 3.0
    assert torch.equal(round_activations(x), x)


def test_codes_agree_with_torchao_given_the_same_scales() -> None:
    quant_primitives = pytest.importorskip("torchao.quantization.quant_primitives")
    weight = random_weight(5)
    scales = group_scales(weight, SPEC)
    theirs = quant_primitives.quantize_affine(
        weight, (1, 32), scales.float(), torch.zeros_like(scales, dtype=torch.int32), torch.int8, -8, 7
    )
    ours = quantize(weight, scales, SPEC)
    # torchao multiplies by 1 / scale where we divide: a weight within an ulp of a tie may go the other way.
    assert (theirs != ours).float().mean() < 1e-3
    assert (theirs.int() - ours.int()).abs().max() <= 1


def test_scales_are_torchaos_symmetric_ones_rounded_to_fp16() -> None:
    quant_primitives = pytest.importorskip("torchao.quantization.quant_primitives")
    weight = random_weight(6).clamp(min=-100, max=100)
    theirs, _ = quant_primitives.choose_qparams_affine(
        weight, quant_primitives.MappingType.SYMMETRIC, (1, 32), torch.int8, -8, 7
    )
    torch.testing.assert_close(group_scales(weight, SPEC).float(), theirs.view(24, 3), rtol=2**-10, atol=2**-24)
