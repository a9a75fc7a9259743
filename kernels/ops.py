"""Single operations of the C++ runtime on torch tensors: its arithmetic, bit for bit, without gradients.

All tensors are fp32 on the CPU. What each computes, and in which order it adds, is in `kernels/cpu/src/float_ops.h`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.runtime import library


def linear_int4(x: Tensor, panels: Tensor, rows: int, *, by_output: bool = False) -> Tensor:
    """[..., rows] = x [..., K], rounded to INT8 a row, times a matrix in panels (`packed_layout.pack_int4`, uint8).

    `by_output`: panels of `pack_int4_out`; the row is rounded for each 32 outputs, after their scales.
    """
    x = _dense(x)
    k = x.shape[-1]
    out = torch.empty(*x.shape[:-1], rows)
    count, encoding = x.numel() // k, 2 if by_output else 0
    _check(library().pf_op_linear(encoding, panels.data_ptr(), rows, k, x.data_ptr(), count, out.data_ptr()))
    return out


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Root-mean-square norm over the last dimension."""
    x, n = _dense(x), x.shape[-1]
    scale = None if weight is None else _dense(weight)  # held until the call is over
    out = torch.empty_like(x)
    address = None if scale is None else scale.data_ptr()
    _check(library().pf_op_rms_norm(x.data_ptr(), address, x.numel() // n, n, eps, out.data_ptr()))
    return out


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    gate, up, n = _dense(gate), _dense(up), gate.shape[-1]
    out = torch.empty_like(gate)
    _check(library().pf_op_swiglu(gate.data_ptr(), up.data_ptr(), gate.numel() // n, n, out.data_ptr()))
    return out


def attend(q: Tensor, k: Tensor, v: Tensor, past: int, window: int | None) -> Tensor:
    """Causal attention [T, H, D] of rotated q [T, H, D] over k and v [past + T, K, D]; `window` tokens at most."""
    q, k, v = _dense(q), _dense(k), _dense(v)
    tokens, heads, head_dim = q.shape
    out = torch.empty_like(q)
    seen = window or past + tokens
    _check(library().pf_op_attend(
        q.data_ptr(), k.data_ptr(), v.data_ptr(), tokens, past, heads, k.shape[1], head_dim, seen, out.data_ptr()
    ))  # fmt: skip
    return out


def router_logits(x: Tensor, weight: Tensor) -> Tensor:
    """Logits [T, E] of rows [T, H] and a router's weight [E, H]; neither is rounded."""
    x, weight = _dense(x), _dense(weight)
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"rows {list(x.shape)} and a router {list(weight.shape)} do not match")
    logits = torch.empty(len(x), len(weight))
    _check(library().pf_op_router(x.data_ptr(), weight.data_ptr(), len(x), x.shape[1], len(weight), logits.data_ptr()))
    return logits


def route(
    logits: Tensor, bias: Tensor, top_k: int, *, softmax: bool = False, normalize: bool = True, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Experts int64 [T, k], ids ascending, and their mixing weights [T, k], of logits [T, E] and a balance bias [E].

    The lowest of equals is chosen; a NaN counts as the largest number (`kernels/cpu/src/routing.h`).
    """
    logits, bias = _dense(logits), _dense(bias)
    tokens, experts = logits.shape
    if bias.shape != (experts,):
        raise ValueError(f"a bias of shape {list(bias.shape)} for {experts} experts")
    chosen = torch.empty(tokens, max(top_k, 0), dtype=torch.int32)
    weights = torch.empty(tokens, max(top_k, 0))
    _check(library().pf_op_route(
        logits.data_ptr(), bias.data_ptr(), tokens, experts, top_k, int(softmax), int(normalize), scale,
        chosen.data_ptr(), weights.data_ptr(),
    ))  # fmt: skip
    return chosen.long(), weights


def mix(first: Tensor | None, rows: Tensor, weights: Tensor) -> Tensor:
    """first [T, H] (None: 0) plus weights [T, k] times rows [T, k, H], added in order with fused multiply-adds."""
    rows, weights = _dense(rows), _dense(weights)
    start = None if first is None else _dense(first)
    tokens, k, width = rows.shape
    if weights.shape != (tokens, k) or (start is not None and start.shape != (tokens, width)):
        raise ValueError(f"rows {list(rows.shape)} and weights {list(weights.shape)} do not match")
    out = torch.empty(tokens, width)
    address = None if start is None else start.data_ptr()
    _check(library().pf_op_mix(address, rows.data_ptr(), weights.data_ptr(), tokens, k, width, out.data_ptr()))
    return out


def _dense(x: Tensor) -> Tensor:
    if x.dtype != torch.float32 or not x.is_cpu:
        raise ValueError(f"the runtime's operations take fp32 on the CPU; got {x.dtype} on {x.device}")
    return x.detach().contiguous()


def _check(status: int) -> None:
    if status:
        raise ValueError(f"the runtime refused a shape (status {status}); sizes must be multiples of 32, experts at most "
                         "4096 and 64 a token")
