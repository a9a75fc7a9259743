"""Fields of a config.json, checked one by one: numbers, and RoPE, which has been written in three ways over the years."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from modeling.config import ModelConfig, RopeScaling
from modeling.hf_layouts import ConversionError, Layout


def whole(hf: Mapping[str, Any], key: str) -> int:
    """A whole number of a config."""
    value = hf.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**31:
        raise ConversionError(f"config.json has {key}={value!r}; expected a whole number")
    return value


def number(hf: Mapping[str, Any], key: str, *, where: str = "config.json", least: float | None = None) -> float:
    """A finite number: above 0, or `least` or more."""
    value = hf.get(key)
    fits = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not fits or (value <= 0 if least is None else value < least):  # type: ignore[operator]
        wanted = "above 0" if least is None else f"of at least {least:g}"
        raise ConversionError(f"{where} has {key}={value!r}; expected a number {wanted}")
    return float(value)  # type: ignore[arg-type]


def head_sizes(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Heads, key/value heads and the size of one; the last two may be left out."""
    heads = whole(hf, "num_attention_heads")
    return {
        "num_heads": heads,
        "num_kv_heads": heads if hf.get("num_key_value_heads") is None else whole(hf, "num_key_value_heads"),
        "head_dim": whole(hf, "hidden_size") // max(1, heads) if hf.get("head_dim") is None else whole(hf, "head_dim"),
    }


def init_std(hf: Mapping[str, Any]) -> float:
    return 0.02 if hf.get("initializer_range") is None else number(hf, "initializer_range", least=0)


def flag(hf: Mapping[str, Any], key: str) -> bool:
    """True or false."""
    if not isinstance(hf.get(key), bool):
        raise ConversionError(f"config.json has {key}={hf.get(key)!r}; expected true or false")
    return bool(hf[key])


def expect(hf: Mapping[str, Any], key: str, wanted: Any, because: str) -> None:
    """Refuse a key that is there and says something else."""
    if hf.get(key) not in (None, wanted):
        raise ConversionError(f"{key}={hf[key]!r}; {because}")


def read_rope(hf: Mapping[str, Any], layout: Layout) -> tuple[float, RopeScaling | None]:
    """theta and scaling. `rope_theta` and `rope_scaling` until transformers 4, `rope_parameters` since 5; both may be there."""
    found: dict[str, RopeScaling | None] = {}
    theta: Any = hf.get("rope_theta")
    for key in ("rope_parameters", "rope_scaling"):
        part = hf.get(key) or {}
        if not isinstance(part, Mapping):
            raise ConversionError(f"config.json has {key}={part!r}; expected an object")
        if part:
            found[key] = _scaling(part, key, hf, layout)
            theta = part.get("rope_theta") or theta
        for place in (part, hf):
            expect(place, "partial_rotary_factor", 1.0, "our decoder rotates whole heads")
    if len(set(found.values())) > 1:
        raise ConversionError("rope_parameters and rope_scaling disagree; expected one of them, or the same twice")
    return number({"rope_theta": theta}, "rope_theta"), next(iter(found.values()), None)


def _scaling(part: Mapping[str, Any], key: str, hf: Mapping[str, Any], layout: Layout) -> RopeScaling | None:
    kind = part.get("rope_type", part.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3" or layout == "mobilellm":
        raise ConversionError(f"{key} is {kind!r}; the {layout} layout is read with plain RoPE"
                              + ("" if layout == "mobilellm" else " or llama3"))
    original = "original_max_position_embeddings"
    positions = whole(part if original in part else {original: hf.get("max_position_embeddings")}, original)
    low, high = (number(part, f"{name}_freq_factor", where=key) for name in ("low", "high"))
    try:
        return RopeScaling(factor=number(part, "factor", where=key, least=1), original_positions=positions,
                           low_frequency=low, high_frequency=high)  # fmt: skip
    except ValueError as error:
        raise ConversionError(f"{key}: {error}") from None


def write_rope(config: ModelConfig, *, old_keys_only: bool = False) -> dict[str, Any]:
    """RoPE in the old keys and, unless told otherwise, in the new one: every version reads one of them."""
    scaling = config.rope_scaling
    old = None if scaling is None else {
        "rope_type": "llama3", "factor": scaling.factor, "original_max_position_embeddings": scaling.original_positions,
        "low_freq_factor": scaling.low_frequency, "high_freq_factor": scaling.high_frequency,
    }  # fmt: skip
    new = {**(old or {"rope_type": "default"}), "rope_theta": config.rope_theta}
    return {"rope_theta": config.rope_theta, "rope_scaling": old} | ({} if old_keys_only else {"rope_parameters": new})
