"""Products through oneDNN against torch's own, forward and backward."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from kernels import products


@pytest.fixture(params=[True, False], ids=["onednn", "torch"])
def library(request, monkeypatch):
    """Both branches run wherever torch carries oneDNN, whatever this machine would choose."""
    if request.param and not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(products, "_onednn_is_faster", lambda: request.param)


@pytest.mark.parametrize("shape", [(1, 8), (63, 8), (64, 8), (3, 50, 40), (300, 129)])
def test_a_linear_is_torchs_forward_and_backward(library, shape):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(shape, generator=generator, requires_grad=True)
    weight = torch.randn(24, shape[-1], generator=generator, requires_grad=True)
    grad = torch.randn(*shape[:-1], 24, generator=generator)
    ours, theirs = products.linear(x, weight), F.linear(x, weight)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-5)
    for a, b in zip(*(torch.autograd.grad(y, (x, weight), grad) for y in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-5)


def test_a_product_takes_transposed_views(library):
    a, b = torch.randn(200, 96), torch.randn(96, 130)
    torch.testing.assert_close(products.product(a, b.T), a @ b, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(products.product(b.T, a.new_ones(7, 96)), b.T.sum(1, keepdim=True).expand(130, 7))


def test_other_types_and_autocast_go_to_torch(library):
    x, weight = torch.randn(80, 16), torch.randn(8, 16)
    assert products.linear(x.bfloat16(), weight.bfloat16()).dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert products.linear(x, weight).dtype == torch.bfloat16
