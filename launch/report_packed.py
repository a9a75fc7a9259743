"""The report's part about the packed model: what a device measured, and where a token's time goes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

_ROWS = (
    ("Prefill", "prefill_tokens_per_second", "{:,.0f} tokens/s", 1.0),
    ("Decode", "decode_tokens_per_second", "{:,.0f} tokens/s", 1.0),
    ("Time to first token", "time_to_first_token_ms", "{:.3g} ms", 1.0),
    ("Share of the read bandwidth that decode reached", "decode_share_of_bandwidth", "{:.0%}", 1.0),
    ("Peak memory", "peak_memory_bytes", "{:,.1f} MiB", 2.0**-20),
    ("Packed file", "weight_bytes", "{:,.1f} MiB", 2.0**-20),
    ("Key/value cache", "kv_bytes", "{:,.1f} MiB", 2.0**-20),
)


def packed_rows(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(label, value) of what was measured; a number that is missing or null is left out."""
    rows = [(label, form.format(value * factor)) for label, key, form, factor in _ROWS
            if (value := _number(found.get(key))) is not None]
    if rows:
        where = ", ".join(str(found[key]) for key in ("device", "fidelity", "isa") if key in found)
        size = f"{found.get('threads', '?')} thread(s), {found.get('prompt_tokens', '?')} prompt tokens"
        rows.insert(0, ("Where", f"{where}, {size}"))
    return rows


def operation_bars(found: Mapping[str, Any]) -> list[tuple[str, float, list[tuple[str, float, float]]]]:
    """(title, total ms, [(operation, ms, share of the largest)]) of the prompt and of one decoded token."""
    operations = found.get("operations")
    result = []
    for key, title in (("prefill_ms", "The whole prompt"), ("decode_ms", "One decoded token")):
        table = operations.get(key) if isinstance(operations, Mapping) else None
        if not isinstance(table, Mapping):
            continue
        if parts := {str(name): value for name, raw in table.items() if (value := _number(raw))}:
            largest = max(parts.values())
            result.append((title, sum(parts.values()), [(name, value, value / largest) for name, value in parts.items()]))
    return result


def _number(value: Any) -> float | None:
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0
    return float(value) if good else None
