"""The published sizes of the families, name to `ModelConfig`.

MobileLLM and -LS: arXiv 2402.14905 and its repository. -R1: arXiv 2509.24945. -Pro: arXiv 2511.06719.
-Flash: arXiv 2603.15954. MobileMoE: arXiv 2605.27358; its routing scale is that of the released configuration. Pro's and
Flash's RoPE base and use of QK-norm were not published where we could read them; we take 500,000 (Llama 3's) and no
QK-norm. Flash's vocabulary is inferred from its parameter counts.
"""

from __future__ import annotations

import difflib
from dataclasses import replace
from typing import Any

from modeling.config import AttentionKind, ModelConfig, RopeScaling
from modeling.moe_config import MoEConfig


def _mobilellm(layers: int, hidden: int, heads: int, kv_heads: int, ffn: int, **more: Any) -> ModelConfig:
    return ModelConfig(
        vocab_size=32_000, hidden_size=hidden, num_layers=layers, num_heads=heads, num_kv_heads=kv_heads, ffn_size=ffn,
        max_positions=2048, rope_theta=10_000.0, **more,
    )  # fmt: skip


def _r1(layers: int, hidden: int, heads: int, kv_heads: int, ffn: int) -> ModelConfig:
    """As released: after the 32k stage, which multiplied the base of 1,000,000 by 8."""
    return ModelConfig(
        vocab_size=128_256, hidden_size=hidden, num_layers=layers, num_heads=heads, num_kv_heads=kv_heads, ffn_size=ffn,
        max_positions=32_768, rope_theta=8_000_000.0, qk_norm=True,
    )  # fmt: skip


def _flash(layers: int, hidden: int, ffn: int, attending: set[int]) -> ModelConfig:
    kinds: tuple[AttentionKind, ...] = tuple("full" if layer in attending else "skip" for layer in range(layers))
    return ModelConfig(
        vocab_size=202_048, hidden_size=hidden, num_layers=layers, num_heads=32, num_kv_heads=8, ffn_size=ffn,
        max_positions=8192, rope_theta=500_000.0, attention=kinds,
    )  # fmt: skip


def _pro() -> ModelConfig:
    """Local window 512; every fourth layer, the first and the last see everything."""
    layers = 30
    kinds: tuple[AttentionKind, ...] = tuple(
        "full" if layer % 4 == 0 or layer == layers - 1 else "window" for layer in range(layers)
    )
    return ModelConfig(
        vocab_size=202_048, hidden_size=1280, num_layers=layers, num_heads=20, num_kv_heads=4, ffn_size=6144,
        max_positions=131_072, rope_theta=500_000.0, attention=kinds, window=512,
    )  # fmt: skip


def _mobilemoe(layers: int, hidden: int) -> ModelConfig:
    """64 experts of an eighth of a dense feed-forward, four of them merged into one that every token uses."""
    ffn = 4 * hidden
    return ModelConfig(
        vocab_size=128_256, hidden_size=hidden, num_layers=layers, num_heads=hidden // 64, num_kv_heads=4, ffn_size=ffn,
        max_positions=8192, rope_theta=500_000.0, qk_norm=True,
        rope_scaling=RopeScaling(factor=16.0, original_positions=8192, low_frequency=1.0, high_frequency=1.0),
        moe=MoEConfig(num_experts=60, top_k=4, expert_size=ffn // 8, shared_size=ffn // 2, route_scale=2.5),
    )  # fmt: skip


_125M = _mobilellm(30, 576, 9, 3, 1536)
_350M = _mobilellm(32, 960, 15, 5, 2560)

FAMILIES: dict[str, ModelConfig] = {
    "mobilellm_125m": _125M,
    "mobilellm_ls_125m": replace(_125M, block_repeat=2),
    "mobilellm_350m": _350M,
    "mobilellm_ls_350m": replace(_350M, block_repeat=2),
    "mobilellm_600m": _mobilellm(40, 1152, 18, 6, 3072),
    "mobilellm_1b": _mobilellm(54, 1280, 20, 5, 3584),
    "mobilellm_1_5b": _mobilellm(54, 1600, 25, 5, 4352),
    "mobilellm_r1_140m": _r1(15, 576, 9, 3, 2048),
    "mobilellm_r1_360m": _r1(15, 1024, 16, 4, 4096),
    "mobilellm_r1_950m": _r1(22, 1536, 24, 6, 6144),
    "mobilellm_pro_1b": _pro(),
    "mobilellm_flash_350m": _flash(12, 1024, 4096, {0, 1, 3, 6, 7, 9, 11}),
    "mobilellm_flash_650m": _flash(13, 1280, 6144, {0, 2, 3, 5, 7, 8, 9, 10}),
    "mobilellm_flash_1_4b": _flash(16, 2048, 8192, set(range(16))),
    "mobilemoe_s": _mobilemoe(20, 768),
    "mobilemoe_m": _mobilemoe(26, 1024),
    "mobilemoe_l": _mobilemoe(32, 1280),
}


def family(name: str) -> ModelConfig:
    """The published shape of that name. Raises ValueError with the nearest name."""
    if name not in FAMILIES:
        close = difflib.get_close_matches(name, FAMILIES, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"expected one of {', '.join(FAMILIES)}"
        raise ValueError(f"no family named {name!r}; {hint}")
    return FAMILIES[name]
