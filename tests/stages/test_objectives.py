"""The chunked losses against torch's own, values and gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from stages import objectives
from stages.objectives import (
    IGNORE,
    Teacher,
    kl_divergence,
    linear_cross_entropy,
    linear_distillation,
    linear_token_nll,
)

TOKENS, WIDTH, VOCABULARY = 150, 16, 97


@pytest.fixture(autouse=True)
def several_chunks(monkeypatch):
    monkeypatch.setitem(objectives.CHUNK_BYTES, "cpu", 64 * 4 * VOCABULARY)  # 64 rows: three chunks, the last ragged


def operands(dtype=torch.float32, ignored: float = 0.3, scale: float = 1.0):
    generator = torch.Generator().manual_seed(0)
    hidden = (torch.randn(3, TOKENS // 3, WIDTH, generator=generator) * scale).to(dtype).requires_grad_()
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(0, VOCABULARY, (3, TOKENS // 3), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < ignored] = IGNORE
    return hidden, weight, labels


def gradients(loss, *inputs):
    return torch.autograd.grad(loss / 7.0, inputs)


def reference_cross_entropy(hidden, weight, labels):
    logits = (hidden @ weight.T).float().flatten(0, 1)
    return F.cross_entropy(logits, labels.flatten(), ignore_index=IGNORE, reduction="sum")


@pytest.mark.parametrize("ignored", [0.0, 0.3, 1.0])
def test_cross_entropy_and_its_gradients_are_torchs(ignored):
    hidden, weight, labels = operands(ignored=ignored)
    ours, theirs = linear_cross_entropy(hidden, weight, labels), reference_cross_entropy(hidden, weight, labels)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    for got, expected in zip(gradients(ours, hidden, weight), gradients(theirs, hidden, weight), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_masked_rows_give_the_same_as_dropped_rows():
    """On a GPU ignored labels are masked inside the chunk instead of being dropped before it."""
    hidden, weight, labels = operands()
    direct = objectives._VocabularyLoss.apply(hidden.flatten(0, 1), weight, labels.flatten(), None, None, 0.0, 1.0)
    torch.testing.assert_close(direct, linear_cross_entropy(hidden, weight, labels))
    torch.testing.assert_close(
        gradients(direct, hidden), gradients(linear_cross_entropy(hidden, weight, labels), hidden), rtol=1e-5, atol=1e-6
    )


def test_large_logits_stay_finite():
    hidden, weight, labels = operands(scale=1e4)
    loss = linear_cross_entropy(hidden, weight, labels)
    torch.testing.assert_close(loss, reference_cross_entropy(hidden, weight, labels), rtol=1e-5, atol=1e-2)
    assert all(grad.isfinite().all() for grad in gradients(loss, hidden, weight))


@pytest.mark.parametrize("autocast", [False, True])
def test_bf16_operands_get_an_fp32_softmax(autocast):
    hidden, weight, labels = operands(torch.float32 if autocast else torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        loss = linear_cross_entropy(hidden, weight, labels)
    assert loss.dtype == torch.float32
    rounded = [t.detach().to(torch.bfloat16).requires_grad_() for t in (hidden, weight)]
    expected = reference_cross_entropy(*rounded, labels)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-4)
    for got, wanted in zip(gradients(loss, hidden, weight), gradients(expected, *rounded), strict=True):
        assert got.dtype == hidden.dtype
        torch.testing.assert_close(got.float(), wanted.float(), rtol=0.03, atol=0.03)


@pytest.mark.parametrize("mix", [1.0, 0.4])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_distillation_is_kl_and_cross_entropy_mixed(mix, temperature):
    hidden, weight, labels = operands()
    said = Teacher(torch.randn(*hidden.shape[:-1], 8), torch.randn(VOCABULARY, 8, requires_grad=True))
    ours = linear_distillation(hidden, weight, labels, said, mix=mix, temperature=temperature)
    divergence = kl_divergence(
        hidden @ weight.T / temperature, said.hidden @ said.weight.T / temperature, labels != IGNORE
    )
    theirs = mix * temperature**2 * divergence + (1 - mix) * reference_cross_entropy(hidden, weight, labels)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    for got, expected in zip(gradients(ours, hidden, weight), gradients(theirs, hidden, weight), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert said.weight.grad is None


def test_kl_to_itself_is_zero_and_has_no_gradient():
    hidden, weight, labels = operands()
    loss = linear_distillation(hidden, weight, labels, Teacher(hidden.detach(), weight.detach()))
    assert abs(float(loss.detach())) < 1e-4
    assert all(grad.abs().max() < 1e-5 for grad in gradients(loss, hidden, weight))


def test_token_nll_is_per_token_and_zero_where_nothing_is_scored():
    hidden, weight, labels = operands()
    nll = linear_token_nll(hidden, weight, labels)
    assert nll.shape == labels.shape and not nll.requires_grad
    assert (nll[labels == IGNORE] == 0).all()
    torch.testing.assert_close(nll.sum(), reference_cross_entropy(hidden, weight, labels).detach())
