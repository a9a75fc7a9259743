"""Triton kernels for GPUs: grouped products of training, moves of rows, experts of four bits; see docs/triton-kernels.md.

Importing the package costs nothing and needs no triton: a name is looked up in its module when it is first used, and
without triton that raises ModuleNotFoundError with a line on what to install. `packed` and `reference` are plain torch.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

_MODULES = {
    "grouped_linear": "grouped_gemm",
    "plan_dropless": "permute", "gather_rows": "permute", "combine_rows": "permute",
    "PackedExperts": "packed", "pack_experts": "packed",
    "quantize_rows": "rows", "swiglu_rows": "rows", "swiglu_quantize_rows": "rows",
    "grouped_w4": "w4_grouped", "matvec_w4": "w4_matvec", "MatvecBlocks": "w4_matvec",
    "moe_w4a16": "moe", "moe_w4a8": "moe", "MoeBlocks": "moe",
    "Blocks": "blocks",
}  # fmt: skip
__all__ = [*_MODULES, "installed"]


def installed() -> bool:
    """Whether this environment has the package triton. Says nothing about a GPU."""
    return find_spec("triton") is not None


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"kernels.triton has no {name!r}; it has {', '.join(sorted(__all__))}")
    return getattr(import_module(f"kernels.triton.{_MODULES[name]}"), name)
