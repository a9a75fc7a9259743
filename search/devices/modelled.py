"""A device that is not there: cycles of the compiled kernels, clocks and bandwidth give a time for every operation.

t(operation) = max(multiply-adds * cycles / (clock * efficiency * threads), bytes / bandwidth) + launch. Rows are split
evenly over threads, as the runtime does, so the slowest core used sets the pace. Of a mixture of experts a token reads and
multiplies those it chose; a prompt reads each that any of its tokens chose, whose rows fill tiles. A model of a device, never
the device: its numbers are marked `analytic`, and a profile says what it was calibrated on and what was kept aside to check it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kernels.packed_file import PackedFileError, read_metadata
from search.devices.base import Fidelity, Measurement, MeasureRequest

PROFILES = Path(__file__).with_name("profiles")
INT4_BYTES, INT8_BYTES = 0.5625, 1.0
KV_BYTES = {"f32": 4.0, "f16": 2.0, "int8": 1.0625}
ELEMENTWISE_CYCLES = 1.0
"""Of one value through norm, rounding, rotation or SwiGLU."""
TILE = 4
"""Rows that the products of a prompt take at once: what an expert has too few of for whole tiles is waited for all the same."""
ROUTE_CYCLES = 2.0
"""Of one expert's score in one token: its function, and the search for the largest."""


@dataclass(frozen=True)
class Core:
    """One kind of core; cycles are per 512 multiply-adds of INT4 weights."""

    kind: str
    ghz: float
    count: int
    gemv_cycles: float
    gemm_cycles: float
    fp32_flops_per_cycle: float


@dataclass(frozen=True)
class Profile:
    """What the model knows of a device, from `profiles/NAME.json`."""

    name: str
    isa: str
    cores: tuple[Core, ...]
    one_thread_gb_s: float
    all_threads_gb_s: float
    efficiency: float
    """Of the speed that the static analysis promises, the share that calibration found; above 1 where it was too careful."""
    launch_us: float

    def slowest(self, threads: int) -> Core:
        """The slowest of the cores that so many threads use, fastest first. Raises ValueError for more than there are."""
        left = threads
        for core in self.cores:
            left -= core.count
            if left <= 0:
                return core
        raise ValueError(f"threads={threads}; the profile {self.name} has {sum(core.count for core in self.cores)} cores")

    def bandwidth(self, threads: int) -> float:
        """Bytes a second."""
        return 1e9 * min(self.one_thread_gb_s * threads, self.all_threads_gb_s)


def load_profile(name: str) -> Profile:
    """A committed profile by name, or a JSON file. Raises ValueError."""
    path = Path(name) if name.endswith(".json") else PROFILES / f"{name}.json"
    if not path.is_file():
        known = ", ".join(sorted(item.stem for item in PROFILES.glob("*.json")))
        raise ValueError(f"model:{name}: no such profile; expected one of {known}, or a JSON file")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        bandwidth = found["bandwidth_gb_s"]
        profile = Profile(
            found["name"], found["isa"], tuple(Core(**core) for core in found["cores"]), bandwidth["one_thread"],
            bandwidth["all_threads"], found["efficiency"], found["launch_us"],
        )  # fmt: skip
        sizes = [value for core in profile.cores for name, value in vars(core).items() if name != "kind"]
        sizes += [profile.one_thread_gb_s, profile.all_threads_gb_s, profile.efficiency]
        if not profile.cores or not all(0 < size < math.inf for size in sizes) or not 0 <= profile.launch_us < math.inf:
            raise ValueError("cores, bandwidth and efficiency must be there and above 0")
        if not all(isinstance(text, str) for text in (profile.name, profile.isa)):
            raise ValueError("name and isa must be text")
    except (OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a device profile ({error}); see {PROFILES / 'oneplus_12.json'}") from None
    return profile


@dataclass(frozen=True)
class Experts:
    """Of the layers with experts."""

    count: int
    chosen: int
    """Of them, by a token."""
    width: int
    shared: int
    """Width of the one that every token uses; 0 for none."""
    first: int
    """Executed layers before them, which are dense."""

    @classmethod
    def of(cls, model: Mapping[str, Any]) -> Experts | None:
        """From the metadata of a packed file. Raises ValueError for sizes that are none."""
        moe = model.get("moe")
        if moe is None:
            return None
        sizes = [moe[name] for name in ("num_experts", "top_k", "expert_size", "shared_size", "dense_layers")]
        whole = all(isinstance(size, int) and not isinstance(size, bool) and size >= 0 for size in sizes)
        if not whole or not 1 <= moe["top_k"] <= moe["num_experts"] or moe["expert_size"] < 1:
            raise ValueError(f"experts {sizes}")
        count, chosen, width, shared, dense = sizes
        return cls(count, chosen, width, shared, dense * model["block_repeat"])

    def used(self, tokens: int) -> float:
        """How many of them so many tokens use, on average over routers without a preference."""
        return self.count * (1 - (1 - self.chosen / self.count) ** tokens)


@dataclass(frozen=True)
class Shape:
    """The sizes that the time depends on."""

    hidden: int
    query: int
    kv: int
    ffn: int
    vocab: int
    windows: tuple[int | None, ...]
    """Of every executed layer: how many tokens it sees at most, 0 for none, None for all."""
    head_bytes: float
    """A weight of the output layer."""
    experts: Experts | None = None

    @classmethod
    def of(cls, model: Mapping[str, Any], *, int8_head: bool) -> Shape:
        """From the metadata of a packed file."""
        seen = {"full": None, "window": model["window"], "skip": 0}
        windows = tuple(seen[kind] for kind in model["attention"] for _ in range(model["block_repeat"]))
        return cls(model["hidden_size"], model["num_heads"] * model["head_dim"], model["num_kv_heads"] * model["head_dim"],
                   model["ffn_size"], model["vocab_size"], windows, INT8_BYTES if int8_head else INT4_BYTES,
                   Experts.of(model))  # fmt: skip


@dataclass(frozen=True)
class _Pace:
    """How fast so many threads of a device are."""

    core: Core
    speed: float
    """Cycles a second that count, of all threads."""
    bandwidth: float
    launch: float

    def product(self, rows: int, k: int, count: int, weight_bytes: float = INT4_BYTES, *, matrices: float = 1.0) -> float:
        """Of so many matrices with `count` rows of activations each, in one launch."""
        cycles = self.core.gemv_cycles if count == 1 else self.core.gemm_cycles
        seconds = max(rows * k * count / 512 * cycles / self.speed, rows * k * weight_bytes / self.bandwidth)
        return matrices * seconds + self.launch

    def floats(self, flops: float, read_bytes: float) -> float:
        return max(flops / self.core.fp32_flops_per_cycle / self.speed, read_bytes / self.bandwidth) + self.launch

    def values(self, count: float) -> float:
        return count * ELEMENTWISE_CYCLES / self.speed


def operation_times(shape: Shape, profile: Profile, *, tokens: int, past: int, threads: int, kv: str) -> dict[str, float]:
    """Seconds by operation of `tokens` tokens after `past`; the output layer reads one of them."""
    core = profile.slowest(threads)
    pace = _Pace(core, core.ghz * 1e9 * profile.efficiency * threads, profile.bandwidth(threads), profile.launch_us * 1e-6)
    times = dict.fromkeys(("qkv", "attention", "attention out", "gate and up", "down", "elementwise", "head"), 0.0)
    for layer, window in enumerate(shape.windows):
        if window != 0:
            seen = sum(min(past + t + 1, window or past + tokens) for t in range(tokens))
            read = 2 * shape.kv * min(past + tokens, window or past + tokens) * KV_BYTES[kv]
            times["qkv"] += pace.product(shape.query + 2 * shape.kv, shape.hidden, tokens)
            times["attention"] += pace.floats(4 * shape.query * seen, read)
            times["attention out"] += pace.product(shape.hidden, shape.query, tokens)
        experts, ffn = shape.experts, shape.ffn
        if experts is not None and layer >= experts.first:
            ffn = experts.chosen * experts.width + experts.shared
            for name, seconds in _expert_times(experts, shape.hidden, tokens, pace).items():
                times[name] = times.get(name, 0.0) + seconds
        else:
            times["gate and up"] += pace.product(2 * ffn, shape.hidden, tokens)
            times["down"] += pace.product(shape.hidden, ffn, tokens)
        values = tokens * (4 * shape.hidden + (2 * (shape.query + shape.kv) if window != 0 else 0) + 3 * ffn)
        times["elementwise"] += pace.values(values)
    times["head"] = pace.product(shape.vocab, shape.hidden, 1, shape.head_bytes)
    return times


def _expert_times(experts: Experts, hidden: int, tokens: int, pace: _Pace) -> dict[str, float]:
    """Seconds of one layer's products, router and sorting, by operation."""
    pairs, used = tokens * experts.chosen, experts.used(tokens)
    rows = 1 if tokens == 1 else TILE * math.ceil(pairs / used / TILE)
    found = {"gate and up": pace.product(2 * experts.width, hidden, rows, matrices=used),
             "down": pace.product(hidden, experts.width, rows, matrices=used)}  # fmt: skip
    if experts.shared:
        found["gate and up"] += pace.product(2 * experts.shared, hidden, tokens)
        found["down"] += pace.product(hidden, experts.shared, tokens)
    found["route"] = pace.floats(2 * tokens * experts.count * hidden, 4 * experts.count * hidden)
    found["route"] += tokens * experts.count * ROUTE_CYCLES / pace.speed
    found["gather"] = pace.values(pairs * hidden) if tokens > 1 else 0.0
    found["mix"] = pace.values(pairs * hidden)
    return found


def _shape(path: Path) -> tuple[Shape, int]:
    """The sizes of a packed file, and the longest text it reads. Raises PackedFileError."""
    metadata = read_metadata(path)
    try:
        encodings = {tensor["name"]: tensor["encoding"] for tensor in metadata["tensors"]}
        shape = Shape.of(metadata["model"], int8_head=encodings.get("head", encodings["embed"]) == "int8_row")
        sizes = (shape.hidden, shape.query, shape.kv, shape.ffn, shape.vocab, metadata["model"]["max_positions"])
        if not all(isinstance(size, int) and size > 0 for size in sizes):
            raise ValueError(f"sizes {sizes}")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise PackedFileError(f"{path}: its metadata describes no model ({error!r}); export it again") from None
    return shape, sizes[-1]


@dataclass(frozen=True)
class ModelledDevice:
    """A profile as a device."""

    profile: Profile
    fidelity: Fidelity = "analytic"

    @property
    def name(self) -> str:
        return f"model:{self.profile.name}"

    def measure(self, request: MeasureRequest) -> Measurement:
        shape, context = _shape(request.model)
        if (needed := request.prompt_tokens + request.decode_tokens) > context:
            raise ValueError(f"{self.name}: {needed} tokens do not fit the model's context of {context}")
        prompt, middle = request.prompt_tokens, request.prompt_tokens + request.decode_tokens // 2
        prefill = operation_times(shape, self.profile, tokens=prompt, past=0, threads=request.threads, kv=request.kv)
        decode = operation_times(shape, self.profile, tokens=1, past=middle, threads=request.threads, kv=request.kv)
        first, step = sum(prefill.values()), sum(decode.values())
        size = request.model.stat().st_size
        kept = [min(prompt + request.decode_tokens, window or prompt + request.decode_tokens)
                for window in shape.windows if window != 0]  # fmt: skip
        kv_bytes = int(2 * shape.kv * KV_BYTES[request.kv] * sum(kept))
        return {
            "prefill_tokens_per_second": prompt / first, "decode_tokens_per_second": 1 / step,
            "time_to_first_token_ms": 1e3 * first, "peak_memory_bytes": size + kv_bytes, "weight_bytes": size,
            "kv_bytes": kv_bytes, "threads": request.threads, "isa": self.profile.isa, "device": self.name,
            "fidelity": self.fidelity, "prompt_tokens": prompt, "decode_tokens": request.decode_tokens, "samples": {},
            "operations": {f"{phase}_ms": {name: 1e3 * value for name, value in times.items()}
                           for phase, times in (("prefill", prefill), ("decode", decode))},
            "note": "modelled from a device profile, not measured",
        }  # fmt: skip
