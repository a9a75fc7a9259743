"""What all kernels share: triton itself, or a clear refusal; and what differs between a GPU and the interpreter.

TRITON_INTERPRET=1, set before anything in the process imports triton, runs kernels on CPU tensors in numpy. It checks what
they compute, not how a GPU runs them: no races, no limits of shared memory, no rounding to TF32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ModuleNotFoundError(
        "kernels.triton needs the package triton, which this environment lacks; install the release of your torch "
        "(3.6.0 for torch 2.11, 3.7.1 for 2.13); in a checkout, pip install -c constraints.txt '.[triton]'",
        name="triton",
    ) from error

__all__ = ["INTERPRETED", "PRODUCT_TYPES", "TL_TYPES", "check_tensors", "multiply", "narrow", "precision", "tl", "triton"]

INTERPRETED: bool = bool(triton.knobs.runtime.interpret)
"""Fixed when triton is imported: its own functions (tl.sum, tl.cdiv) are compiled or interpreted from then on."""
TL_TYPES: dict[torch.dtype, Any] = {
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
}
_INTERPRETED: tl.constexpr = tl.constexpr(INTERPRETED)  # the only kind of global that a kernel may read
PRODUCT_TYPES = frozenset(TL_TYPES)
"""What `tl.dot` multiplies here; it has no fp64 that every supported release and GPU runs."""


def precision(dtype: torch.dtype) -> str:
    """The `input_precision` of fp32 products: as torch's own follow torch.backends.cuda.matmul.allow_tf32."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"


def check_tensors(**tensors: Tensor) -> None:
    """Raise ValueError unless all lie on one device that the kernels of this process run on."""
    devices = {tensor.device for tensor in tensors.values()}
    if len(devices) > 1:
        where = ", ".join(f"{name} on {tensor.device}" for name, tensor in tensors.items())
        raise ValueError(f"tensors of one call lie on several devices: {where}; move them to one")
    (device,) = devices
    if device.type != "cuda" and not INTERPRETED:
        raise ValueError(
            f"Triton kernels run on a GPU, got tensors on {device}; move them there, or set TRITON_INTERPRET=1 before "
            "triton is first imported to run (slowly) on a CPU"
        )
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        # Triton launches on the current device, whatever the tensors say.
        current = torch.cuda.current_device()
        raise ValueError(f"tensors on {device}, but cuda:{current} is the current device; call within torch.cuda.device")


@triton.jit
def multiply(a, b, total, PRECISION: tl.constexpr):
    """total + a @ b, summed in fp32: every real product goes through here.

    The interpreter holds bf16 as the 16 bits of its pattern, and its `tl.dot` multiplies those as integers without a word
    (triton issue 11584). There both sides are widened first; fp32 holds every product of two bf16, so the sum is the same.
    """
    if _INTERPRETED and a.dtype == tl.bfloat16:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def narrow(x, TYPE: tl.constexpr):
    """fp32 `x` in another type, rounded half to even as a GPU does: the interpreter cuts the lower bits of a bf16 off."""
    if _INTERPRETED and TYPE == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        x = tl.where(x == x, (bits & -65536).to(tl.float32, bitcast=True), x)
    return x.to(TYPE)
