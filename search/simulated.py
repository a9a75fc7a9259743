"""A device for tests: a known latency for every architecture, and everything that goes wrong with real devices.

The truth is a device profile's (search/devices/modelled.py). On it lie noise, positive outliers, slow first runs after a
load, throttling while it is warm, and faults at given probabilities. Seeded. Nothing it says was measured: `analytic`.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kernels.packed_file import is_packed, read_metadata
from modeling.config import ModelConfig
from search.devices.base import DeviceCrash, DeviceError, DeviceTimeout, Fidelity, Measurement, MeasureRequest, Thermals
from search.devices.modelled import Shape, load_profile, operation_times
from search.members import Clock


@dataclass(frozen=True, kw_only=True)
class Faults:
    """Probabilities; each is drawn once a measurement, but a model that crashes does so every time."""

    crash: float = 0.0
    timeout: float = 0.0
    lost: float = 0.0
    wrong_output: float = 0.0
    """Computes something else, in half the time."""
    nonsense: float = 0.0
    late: float = 0.0
    """Answers rightly, long after it should have."""


@dataclass(frozen=True, kw_only=True)
class Physics:
    """How times differ from the truth."""

    noise: float = 0.02
    outliers: float = 0.03
    outlier_factor: float = 3.0
    """The largest; the smallest is 1.2."""
    warmup_runs: int = 3
    warmup_factor: float = 1.8
    ambient_c: float = 25.0
    heat_c_per_s: float = 0.0
    """While it computes; it cools with a time constant of `cooling_s`."""
    cooling_s: float = 60.0
    throttle_c: float = 45.0
    throttle_factor: float = 1.4


def write_shape(config: ModelConfig, path: Path) -> Path:
    """The architecture alone, as a file that a simulated device takes for a model."""
    shape = {**asdict(config), "attention": config.attention_kinds}
    beside = path.with_name(f".{path.name}.part")
    beside.write_text(json.dumps({"model": shape}, sort_keys=True), encoding="utf-8")
    beside.replace(path)  # a device may be reading the one that is there
    return path


class SimulatedDevice:
    """As search.devices.base.Device has it. `speed` scales all its times: devices of a class differ."""

    fidelity: Fidelity = "analytic"

    def __init__(
        self, name: str = "simulated", *, profile: str = "oneplus_12", seed: int = 0, physics: Physics | None = None,
        faults: Faults | None = None, clock: Clock | None = None, speed: float = 1.0, real_s: float | None = None,
    ) -> None:  # fmt: skip
        """`real_s` is how long a measurement lasts on the clock; None for as long as its simulated runs take."""
        self.name, self.profile, self.seed, self.speed = name, load_profile(profile), seed, speed
        self.physics, self.faults = physics or Physics(), faults or Faults()
        self.clock, self.real_s = clock or Clock(), real_s
        self.calls = 0
        self.drift = 1.0
        """Set by a test: the device has become that much slower."""
        self._heat, self._at = 0.0, self.clock.now()

    def truth(self, request: MeasureRequest) -> tuple[float, float]:
        """(time to first token, mean decode step), in seconds, of a cool device without noise."""
        shape = _shape(request.model)
        prompt, threads, kv = request.prompt_tokens, request.threads, request.kv
        prefill = operation_times(shape, self.profile, tokens=prompt, past=0, threads=threads, kv=kv)
        middle = prompt + request.decode_tokens // 2
        decode = operation_times(shape, self.profile, tokens=1, past=middle, threads=threads, kv=kv)
        return self.speed * sum(prefill.values()), self.speed * sum(decode.values())

    def alive(self) -> bool:
        return True

    def thermals(self) -> Thermals:
        return Thermals(self._cool())

    def measure(self, request: MeasureRequest) -> Measurement:
        self.calls += 1
        output_hash = hashlib.sha256(request.model.read_bytes()).hexdigest()[:8]
        wrong = self._fault(request, output_hash)
        ttft, step = self.truth(request)
        draw = self._draw("times", output_hash, request)
        prefill, steps = [], []
        for run in range(request.repeats):
            scale = self.drift * self._factor(run, draw)
            prefill.append(ttft * scale * (1 + self.physics.noise * draw.standard_normal()))
            steps += [step * scale * (1 + self.physics.noise * draw.standard_normal())] * request.decode_tokens
            self._warm(prefill[-1] + request.decode_tokens * steps[-1])
        if self.real_s is not None:
            self.clock.sleep(self.real_s)
        found = self._printed(request, prefill, steps, output_hash)
        if wrong == "wrong_output":
            halved = {name: [value / 2 for value in values] for name, values in found["samples"].items()}
            return {**found, "samples": halved, "logits_crc32c": "baadf00d"}
        if wrong == "nonsense":
            return {**found, "samples": {"prefill_seconds": [-1.0] * len(prefill), "decode_step_seconds": "soon"}}
        return found

    def _printed(self, request: MeasureRequest, prefill: list[float], steps: list[float], output_hash: str) -> Measurement:
        first, each = float(np.median(prefill)), float(np.median(steps))
        return {
            "prefill_tokens_per_second": request.prompt_tokens / first, "decode_tokens_per_second": 1 / each,
            "time_to_first_token_ms": 1e3 * first, "peak_memory_bytes": request.model.stat().st_size,
            "weight_bytes": request.model.stat().st_size, "threads": request.threads, "isa": self.profile.isa,
            "device": self.name, "fidelity": self.fidelity, "prompt_tokens": request.prompt_tokens,
            "decode_tokens": request.decode_tokens, "logits_crc32c": output_hash,
            "samples": {"prefill_seconds": prefill, "decode_step_seconds": steps}, "note": "simulated, not measured",
        }  # fmt: skip

    def _draw(self, what: str, *by: Any) -> np.random.Generator:
        """A generator of its own for every question: the order of questions does not change the answers."""
        asked = [{**asdict(x), "model": None} if isinstance(x, MeasureRequest) else x for x in by]  # not where the file lies
        text = json.dumps([self.seed, what, asked])
        return np.random.default_rng(int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big"))

    def _fault(self, request: MeasureRequest, model: str) -> str:
        faults, draw = self.faults, self._draw("fault", self.calls)
        if self._draw("crash", model).random() < faults.crash:
            raise DeviceCrash(f"{self.name}: pocketforge-run ended with status 139", 139, "Segmentation fault")
        if draw.random() < faults.timeout:
            self.clock.sleep(request.timeout_s)
            raise DeviceTimeout(f"{self.name}: pocketforge-run took longer than {request.timeout_s:g} s and was stopped")
        if draw.random() < faults.lost:
            raise DeviceError(f"{self.name}: the connection ended")
        if draw.random() < faults.late:
            self.clock.sleep(10 * request.timeout_s)
        for name in ("wrong_output", "nonsense"):
            if draw.random() < getattr(faults, name):
                return name
        return ""

    def _factor(self, run: int, draw: np.random.Generator) -> float:
        physics = self.physics
        factor = physics.warmup_factor if run < physics.warmup_runs else 1.0
        if draw.random() < physics.outliers:
            factor *= draw.uniform(1.2, physics.outlier_factor)
        return factor * (physics.throttle_factor if self._cool() > physics.throttle_c else 1.0)

    def _warm(self, seconds: float) -> None:
        if self.real_s is None:
            self.clock.sleep(seconds)
        self._cool()
        self._heat += self.physics.heat_c_per_s * seconds

    def _cool(self) -> float:
        """The temperature now."""
        now = self.clock.now()
        self._heat *= math.exp(-max(0.0, now - self._at) / self.physics.cooling_s)
        self._at = now
        return self.physics.ambient_c + self._heat


def _shape(model: Path) -> Shape:
    """Raises ValueError for a file that is neither a packed model nor an architecture."""
    if is_packed(model):
        return Shape.of(read_metadata(model)["model"], int8_head=False)
    try:
        found: Mapping[str, Any] = json.loads(model.read_text(encoding="utf-8"))["model"]
        return Shape.of(found, int8_head=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{model}: neither a packed model nor an architecture ({error})") from None
