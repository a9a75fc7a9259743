"""What a device is measured for, by name: `ttft_ms`, `decode_ms`, `peak_memory_mib`; elsewhere than at a search's own
prompt length and threads with them behind the name, `decode_ms@512x2` after 512 tokens on 2 threads.

Prefill has no name of its own: the runtime gives the first token with the last of the prompt.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from search.devices.base import MOST

Kind = Literal["ttft", "decode", "peak_memory"]
KINDS: dict[str, Kind] = {"ttft_ms": "ttft", "decode_ms": "decode", "peak_memory_mib": "peak_memory"}
LABELS = {"ttft_ms": "time to first token", "decode_ms": "time of a decoded token", "peak_memory_mib": "peak memory"}
UNITS = {"ttft_ms": "ms", "decode_ms": "ms", "peak_memory_mib": "MiB"}


@dataclass(frozen=True, order=True)
class Point:
    """How a model is run while it is measured."""

    prompt_tokens: int
    threads: int = 1

    def __post_init__(self) -> None:
        for name in ("prompt_tokens", "threads"):
            if not 1 <= getattr(self, name) <= MOST:
                raise ValueError(f"{name}={getattr(self, name)}; expected 1 to {MOST}")

    def __str__(self) -> str:
        return f"{self.prompt_tokens}x{self.threads}"


@dataclass(frozen=True)
class DeviceMetric:
    """One number of a device at one point; the smaller the better."""

    base: str
    """A key of `KINDS`."""
    point: Point
    main: bool
    """Whether `point` is the search's own, which is left out of names."""

    @property
    def name(self) -> str:
        return self.base if self.main else f"{self.base}@{self.point}"

    @property
    def kind(self) -> Kind:
        return KINDS[self.base]

    @property
    def unit(self) -> str:
        return UNITS[self.base]

    def label(self, processor_time: bool = False) -> str:
        """In words, for a page."""
        words = LABELS[self.base] + (", processor time" if processor_time and self.unit == "ms" else "")
        threads = f"{self.point.threads} thread{'s' if self.point.threads > 1 else ''}"
        return words if self.main else f"{words} at {self.point.prompt_tokens} tokens, {threads}"

    def read(
        self, values: Mapping[str, float], errors: Mapping[str, float], times: tuple[str, str]
    ) -> tuple[float, float] | None:
        """(value, standard error or 0) from a measurement's numbers; None where it did not bring this one.

        `times` are the names that the time to the first token and the decode rate have there (`Policy.times`).
        """
        if self.kind == "peak_memory":
            peak = values.get("peak_memory_bytes")
            return None if peak is None else (peak / 2**20, 0.0)
        name = times[0] if self.kind == "ttft" else times[1]
        value, error = values.get(name), errors.get(name, 0.0)
        if value is None or value <= 0:
            return None
        return (value, error) if self.kind == "ttft" else (1e3 / value, 1e3 * error / value**2)


def parse_metric(name: str, main: Point) -> DeviceMetric:
    """Raises ValueError for what is no such name."""
    found = re.fullmatch(r"(?P<base>[a-z_]+)(?:@(?P<tokens>\d{1,7})x(?P<threads>\d{1,7}))?", name)
    if found is None or found["base"] not in KINDS:
        raise ValueError(f"{name!r} is no number of a device; expected {', '.join(KINDS)}, or one of them with "
                         "@TOKENSxTHREADS behind it")  # fmt: skip
    point = main if found["tokens"] is None else Point(int(found["tokens"]), int(found["threads"]))
    return DeviceMetric(found["base"], point, point == main)


def metrics_at(points: Iterable[Point], main: Point) -> list[DeviceMetric]:
    """Every number at every point."""
    return [DeviceMetric(base, point, point == main) for point in points for base in KINDS]
