"""The two GGUF encodings that hold our integers as they are, and back. Blocks of 32 weights along the input axis.

| encoding | block | value |
| --- | --- | --- |
| Q4_0 | fp16 d, 16 bytes: byte j holds element j low and j + 16 high, each as code + 8 | d * code |
| Q8_0 | fp16 d, 32 int8 | d * code |

A group that spans several blocks repeats its scale in each.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

BLOCK = 32


def pack_q4_0(codes: NDArray[np.int8], scales: NDArray[np.float16]) -> NDArray[np.uint8]:
    """Bytes [rows, k / 32 * 18] of codes [rows, k] in -8..7 and fp16 scales [rows, groups]."""
    blocks = (codes.reshape(len(codes), -1, 2, BLOCK // 2) + 8).astype(np.uint8)
    return _join(scales, np.bitwise_or(blocks[:, :, 0], blocks[:, :, 1] << 4, dtype=np.uint8))


def pack_q8_0(codes: NDArray[np.int8], scales: NDArray[np.float16]) -> NDArray[np.uint8]:
    """Bytes [rows, k / 32 * 34] of codes [rows, k] in -128..127 and fp16 scales [rows, groups]."""
    return _join(scales, np.ascontiguousarray(codes).reshape(len(codes), -1, BLOCK).view(np.uint8))


def _join(scales: NDArray[np.float16], bodies: NDArray[np.uint8]) -> NDArray[np.uint8]:
    rows, blocks, _ = bodies.shape
    repeated = np.repeat(scales.astype("<f2"), blocks // scales.shape[1], axis=1)
    heads = np.ascontiguousarray(repeated).view(np.uint8).reshape(rows, blocks, 2)
    return np.concatenate([heads, bodies], axis=2).reshape(rows, -1)


def unpack(data: NDArray[np.uint8], bits: int) -> tuple[NDArray[np.int8], NDArray[np.float16]]:
    """Codes [rows, k] and fp16 scales [rows, k / 32] of Q4_0 (`bits` 4) or Q8_0 (`bits` 8) bytes [rows, n]."""
    blocks = np.ascontiguousarray(data).reshape(len(data), -1, 2 + BLOCK * bits // 8)
    scales = np.ascontiguousarray(blocks[:, :, :2]).view("<f2")[:, :, 0]
    body = np.ascontiguousarray(blocks[:, :, 2:])
    if bits == 4:
        codes = np.concatenate([body & 15, body >> 4], axis=2).astype(np.int8) - np.int8(8)
    else:
        codes = body.view(np.int8)
    return codes.reshape(len(data), -1), scales
