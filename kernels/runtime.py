"""The C++ runtime from Python: `PackedModel` and `Session` over its C interface (kernels/cpu/include/pocketforge.h)."""

from __future__ import annotations

import ctypes
import os
import threading
import weakref
from collections.abc import Sequence
from ctypes import POINTER, byref, c_char_p, c_double, c_float, c_int32, c_size_t, c_uint32, c_uint64, c_void_p
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from kernels.packed_file import document

KvType = Literal["f32", "f16", "int8"]
KV_TYPES: tuple[KvType, ...] = ("f32", "f16", "int8")
IGNORE = -100


class RuntimeLibraryError(RuntimeError):
    """The compiled library is not there, or not this version's."""


class PackedModelError(ValueError):
    """A packed file that the runtime refuses, or something it was asked that makes no sense for the model."""


class _Info(ctypes.Structure):
    _fields_ = [
        (name, c_int32)
        for name in ("vocab_size", "hidden_size", "num_layers", "executed_layers", "num_heads", "num_kv_heads", "head_dim",
                     "ffn_size", "max_positions")
    ] + [("file_bytes", c_uint64), ("decode_bytes", c_uint64), ("layer_weights", c_uint64)] + [
        (name, c_int32) for name in ("num_experts", "top_k", "moe_layers")
    ] + [("expert_bytes", c_uint64)]  # fmt: skip


class _Options(ctypes.Structure):
    _fields_ = [(name, c_int32) for name in ("context", "threads", "kv_type", "batch")]


_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "pf_version": (c_char_p, []),
    "pf_isa_count": (c_int32, []),
    "pf_isa_name": (c_char_p, [c_int32]),
    "pf_isa_supported": (c_int32, [c_int32]),
    "pf_isa_default": (c_int32, []),
    "pf_model_open": (c_int32, [c_char_p, c_int32, c_int32, POINTER(c_void_p), c_char_p, c_size_t]),
    "pf_model_close": (None, [c_void_p]),
    "pf_model_get_info": (None, [c_void_p, POINTER(_Info)]),
    "pf_model_isa": (c_char_p, [c_void_p]),
    "pf_model_metadata": (c_void_p, [c_void_p, POINTER(c_size_t)]),
    "pf_model_tensor": (c_void_p, [c_void_p, c_char_p, POINTER(c_size_t)]),
    "pf_session_create": (c_int32, [c_void_p, POINTER(_Options), POINTER(c_void_p), c_char_p, c_size_t]),
    "pf_session_free": (None, [c_void_p]),
    "pf_session_reset": (None, [c_void_p]),
    "pf_session_length": (c_int32, [c_void_p]),
    "pf_session_kv_bytes": (c_uint64, [c_void_p]),
    "pf_session_eval": (c_int32, [c_void_p, c_void_p, c_int32, c_int32, c_void_p, c_char_p, c_size_t]),
    "pf_session_nll": (c_int32, [c_void_p, c_void_p, c_void_p, c_int32, c_void_p, c_char_p, c_size_t]),
    "pf_sample": (c_int32, [c_void_p, c_int32, c_float, c_float, POINTER(c_uint64)]),
    "pf_operation_count": (c_int32, []),
    "pf_operation_name": (c_char_p, [c_int32]),
    "pf_session_clocks": (None, [c_void_p, c_int32, POINTER(c_double)]),
    "pf_session_experts": (None, [c_void_p, c_void_p, POINTER(c_uint64), POINTER(c_uint64)]),
    "pf_op_linear": (c_int32, [c_int32, c_void_p, c_int32, c_int32, c_void_p, c_int32, c_void_p]),
    "pf_op_rms_norm": (c_int32, [c_void_p, c_void_p, c_int32, c_int32, c_float, c_void_p]),
    "pf_op_swiglu": (c_int32, [c_void_p, c_void_p, c_int32, c_int32, c_void_p]),
    "pf_op_attend": (c_int32, [c_void_p] * 3 + [c_int32] * 6 + [c_void_p]),
    "pf_op_router": (c_int32, [c_void_p, c_void_p, c_int32, c_int32, c_int32, c_void_p]),
    "pf_op_route": (c_int32, [c_void_p] * 2 + [c_int32] * 5 + [c_float, c_void_p, c_void_p]),
    "pf_op_mix": (c_int32, [c_void_p] * 3 + [c_int32] * 3 + [c_void_p]),
    "pf_crc32c": (c_uint32, [c_void_p, c_size_t, c_uint32]),
    "pf_int8_peak": (c_double, [c_int32]),
    "pf_read_bandwidth": (c_double, [c_size_t, c_int32, c_int32]),
}
VERSION = b"1"


def library_path() -> Path:
    """The compiled library: POCKETFORGE_LIBRARY, else what the installation built beside this file."""
    return Path(os.environ.get("POCKETFORGE_LIBRARY") or _built("libpocketforge.so"))


def executable_path() -> Path:
    """The `pocketforge-run` program of this installation."""
    return _built("pocketforge-run")


def _built(name: str) -> Path:
    from importlib.resources import files

    return Path(str(files("kernels").joinpath("lib", name)))


@cache
def library() -> ctypes.CDLL:
    """The library with its functions' types. Raises RuntimeLibraryError."""
    path = library_path()
    try:
        loaded = ctypes.CDLL(str(path))
    except OSError as error:
        raise RuntimeLibraryError(
            f"the C++ runtime cannot be loaded ({error}); build it with `make setup` (it needs a C++17 compiler)"
        ) from None
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(loaded, name, None)
        if function is None:
            raise RuntimeLibraryError(f"{path} has no {name}: it is of another version; build it anew with `make setup`")
        function.restype, function.argtypes = result, arguments
    if loaded.pf_version() != VERSION:
        found = loaded.pf_version().decode()
        raise RuntimeLibraryError(f"{path} is version {found}, expected {VERSION.decode()}; build it anew with `make setup`")
    return loaded


def isas() -> dict[str, bool]:
    """Every kernel variant of this build, and whether this machine runs it."""
    lib = library()
    return {lib.pf_isa_name(i).decode(): bool(lib.pf_isa_supported(i)) for i in range(lib.pf_isa_count())}


def crc32c(data: NDArray[np.uint8], seed: int = 0) -> int:
    """CRC-32C (Castagnoli) of bytes."""
    data = np.ascontiguousarray(data)
    return int(library().pf_crc32c(data.ctypes.data, data.nbytes, seed))


def read_bandwidth(num_bytes: int = 256 << 20, threads: int = 1, repeats: int = 5) -> float:
    """Bytes a second of the fastest of `repeats` passes over a buffer."""
    return float(library().pf_read_bandwidth(num_bytes, threads, repeats))


def int8_peak(repeats: int = 3) -> float:
    """Integer operations a second of one thread's registers alone; 0 where the variant does not say."""
    return float(library().pf_int8_peak(repeats))


class _Failure:
    """The error buffer of one call."""

    def __init__(self) -> None:
        self.text = ctypes.create_string_buffer(512)

    def check(self, status: int, what: str = "") -> None:
        if status:
            raise PackedModelError(what + self.text.value.decode(errors="replace"))


class PackedModel:
    """A mapped packed file. Close it, or use it as a context; its sessions close with it."""

    def __init__(self, path: str | Path, isa: str | None = None, *, verify: bool = True) -> None:
        """`isa` forces a kernel variant by name; `verify` compares every tensor's checksum first."""
        lib = library()
        names = list(isas())
        if isa is not None and isa not in names:
            raise PackedModelError(f"isa {isa!r}; this build has {', '.join(names)}")
        self._handle = c_void_p()
        failure = _Failure()
        index = -1 if isa is None else names.index(isa)
        status = lib.pf_model_open(os.fsencode(path), index, int(verify), byref(self._handle), failure.text, 512)
        failure.check(status, f"{path}: ")
        self.path = Path(path)
        self.info = _Info()
        lib.pf_model_get_info(self._handle, byref(self.info))
        self.isa: str = lib.pf_model_isa(self._handle).decode()
        self._lock = threading.RLock()
        self._sessions: weakref.WeakSet[Session] = weakref.WeakSet()

    def metadata(self) -> dict[str, Any]:
        """The file's JSON."""
        size = c_size_t()
        with self._lock:
            address = library().pf_model_metadata(_open(self._handle, "model"), byref(size))
            text = ctypes.string_at(address, size.value)
        try:
            return document(text)
        except ValueError as error:
            raise PackedModelError(f"{self.path}: metadata: {error}; export it again") from None

    def tensor(self, name: str) -> bytes:
        """A copy of one tensor's bytes. Raises KeyError."""
        size = c_size_t()
        with self._lock:
            address = library().pf_model_tensor(_open(self._handle, "model"), name.encode(), byref(size))
            if not address:
                raise KeyError(name)
            return ctypes.string_at(address, size.value)

    def session(self, context: int | None = None, *, threads: int = 1, kv: KvType = "f16", batch: int = 0) -> Session:
        """A new sequence. `context` is the most tokens it can hold (default: the model's longest)."""
        with self._lock:
            made = Session(self, self.info.max_positions if context is None else context, threads, kv, batch)
            self._sessions.add(made)
        return made

    def close(self) -> None:
        """Unmap the file, after its sessions have finished what they compute."""
        with self._lock:
            for session in list(self._sessions):
                session.close()
            if self._handle:
                library().pf_model_close(self._handle)
                self._handle = c_void_p()

    def __enter__(self) -> PackedModel:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _open(handle: c_void_p, what: str) -> c_void_p:
    if not handle:
        raise PackedModelError(f"the {what} is closed; open it again")
    return handle


def _token_ids(values: Sequence[int] | NDArray[Any], what: str) -> NDArray[np.int32]:
    """Whole numbers in one row, as the library reads them: an array's steps, width and sign do not reach it."""
    found = np.asarray(values)
    if found.ndim != 1 or (found.size and found.dtype.kind not in "iu"):
        raise PackedModelError(f"{what} of shape {list(found.shape)} and type {found.dtype}; expected a row of whole numbers")
    limits = np.iinfo(np.int32)
    if found.size and not limits.min <= int(found.min()) <= int(found.max()) <= limits.max:
        raise PackedModelError(f"{what} from {found.min()} to {found.max()}; expected ids of the vocabulary")
    return np.ascontiguousarray(found, np.int32)


@dataclass(frozen=True)
class ExpertUse:
    """What the routers of a mixture of experts did since the session was made."""

    hits: NDArray[np.uint64]
    """[layers with experts, experts]: tokens that each expert took part in."""
    tokens: int
    """Tokens that went through the model."""
    read_bytes: int
    """Of routed experts' matrices: each one that a batch needs, once a batch and layer."""


class Session:
    """One sequence of tokens on a model, with its key/value cache. Calls from several threads take turns."""

    def __init__(self, model: PackedModel, context: int, threads: int, kv: KvType, batch: int) -> None:
        self.model = model
        self._lock = threading.Lock()
        self._handle = c_void_p()
        failure = _Failure()
        if kv not in KV_TYPES:
            raise PackedModelError(f"kv {kv!r}; expected one of {', '.join(KV_TYPES)}")
        for name, value in (("context", context), ("threads", threads), ("batch", batch)):
            if not -(2**31) <= value < 2**31:  # ctypes would keep its low bits
                raise PackedModelError(f"{name}={value} is far out of range")
        options = _Options(context, threads, KV_TYPES.index(kv), batch)
        handle = _open(model._handle, "model")
        failure.check(library().pf_session_create(handle, byref(options), byref(self._handle), failure.text, 512))

    def eval(self, tokens: Sequence[int] | NDArray[Any], *, all_logits: bool = False) -> NDArray[np.float32]:
        """Add tokens; logits of the last one [V], or of all [len(tokens), V]."""
        ids = _token_ids(tokens, "tokens")
        vocabulary = self.model.info.vocab_size
        logits = np.empty((len(ids), vocabulary) if all_logits else (vocabulary,), np.float32)
        failure = _Failure()
        with self._lock:
            failure.check(library().pf_session_eval(
                self._opened(), ids.ctypes.data, len(ids), int(all_logits), logits.ctypes.data, failure.text, 512
            ))  # fmt: skip
        return logits

    def nll(self, tokens: Sequence[int] | NDArray[Any], labels: Sequence[int] | NDArray[Any]) -> NDArray[np.float32]:
        """Add tokens; the negative log-likelihood of each one's label in nats, 0 where the label is -100."""
        ids, targets = _token_ids(tokens, "tokens"), _token_ids(labels, "labels")
        if ids.shape != targets.shape:
            raise PackedModelError(f"{len(ids)} tokens and {len(targets)} labels; expected as many")
        result = np.empty(len(ids), np.float32)
        failure = _Failure()
        with self._lock:
            failure.check(library().pf_session_nll(
                self._opened(), ids.ctypes.data, targets.ctypes.data, len(ids), result.ctypes.data, failure.text, 512
            ))  # fmt: skip
        return result

    def _opened(self) -> c_void_p:
        return _open(self._handle, "session")

    @property
    def length(self) -> int:
        """Tokens held."""
        with self._lock:
            return int(library().pf_session_length(self._opened()))

    @property
    def kv_bytes(self) -> int:
        """Size of the key/value cache."""
        with self._lock:
            return int(library().pf_session_kv_bytes(self._opened()))

    def reset(self) -> None:
        """Forget all tokens."""
        with self._lock:
            library().pf_session_reset(self._opened())

    def clocks(self, enable: bool = True) -> dict[str, float]:
        """Seconds by operation since the last call, and whether to measure from now on."""
        lib = library()
        seconds = (c_double * lib.pf_operation_count())()
        with self._lock:
            lib.pf_session_clocks(self._opened(), int(enable), seconds)
        return {lib.pf_operation_name(i).decode(): seconds[i] for i in range(len(seconds))}

    def experts(self) -> ExpertUse:
        """How often each expert was chosen, and what was read of them; empty for a dense model."""
        info = self.model.info
        hits = np.zeros((info.moe_layers, info.num_experts), np.uint64)
        tokens, read = c_uint64(), c_uint64()
        with self._lock:
            library().pf_session_experts(self._opened(), hits.ctypes.data, byref(tokens), byref(read))
        return ExpertUse(hits, tokens.value, read.value)

    def close(self) -> None:
        """Free it, after what another thread computes with it."""
        with self._lock:
            if self._handle:
                library().pf_session_free(self._handle)
                self._handle = c_void_p()

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            self.close()


class Sampler:
    """Draws tokens as the runtime does: greedy at temperature 0, else from the likeliest that reach `top_p` together."""

    def __init__(self, temperature: float = 0.0, top_p: float = 1.0, seed: int = 0) -> None:
        self.temperature, self.top_p = temperature, top_p
        self._state = c_uint64(seed * 2 + 1)

    def __call__(self, logits: NDArray[np.float32]) -> int:
        logits = np.ascontiguousarray(logits, np.float32)
        if logits.ndim != 1 or len(logits) == 0:
            raise PackedModelError(f"logits of shape {list(logits.shape)}; expected one token's row")
        return int(library().pf_sample(logits.ctypes.data, len(logits), self.temperature, self.top_p, byref(self._state)))
