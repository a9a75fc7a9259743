"""Matrices in panels of 16 rows, as the runtime reads them; docs/packed-format.md is the specification.

The order of nibbles lets one load feed AVX2, AVX-512 VNNI, NEON dotprod and NEON i8mm without repacking. Everything here
is numpy on plain arrays: what the codes mean is `quant/`'s business.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

PANEL = 16
"""Rows stored together."""
GROUP = 32
"""Weights of a row that share an INT4 scale."""
ALIGNMENT = 64
MOST_OUT_COLUMNS = 16_384
"""Columns of a matrix with groups along its outputs: sums of more products of codes could pass 2^24, and fp32."""

Codes = NDArray[np.int8]
Bytes = NDArray[np.uint8]


def pack_int4(codes: Codes, scales: NDArray[np.float16]) -> Bytes:
    """Bytes of a matrix from codes [rows, k] in -8..7 and scales [rows, k / 32].

    A panel is its scales, fp16 [k / 32][16 rows], padded with zeros to a multiple of 64 bytes, then its codes. Those of a
    group are 4 blocks of 64 bytes; block b, byte 4 r + i holds row r's code 8 b + i in its low and 8 b + 4 + i in its
    high nibble, each plus 8. Missing rows of the last panel have scale 0 and code 0.

    Raises:
        ValueError: k is no multiple of 32, the shapes do not match, or a code is outside -8..7.
    """
    rows, k = _checked(codes, GROUP)
    if scales.shape != (rows, k // GROUP):
        raise ValueError(f"scales {scales.shape}, expected {(rows, k // GROUP)} for codes {codes.shape}")
    if codes.size and (codes.min() < -8 or codes.max() > 7):
        raise ValueError(f"codes from {codes.min()} to {codes.max()}, expected -8 to 7")
    panels, groups = _panels(rows), k // GROUP
    packed = np.zeros((panels, _scale_bytes(groups) + k * PANEL // 2), np.uint8)
    by_panel = _padded(scales.astype("<f2"), panels).reshape(panels, PANEL, groups)
    packed[:, : groups * PANEL * 2] = np.ascontiguousarray(by_panel.transpose(0, 2, 1)).reshape(panels, -1).view(np.uint8)
    nibbles = (_padded(codes, panels) + np.int8(8)).view(np.uint8).reshape(panels, PANEL, groups, 4, 2, 4)
    both = nibbles[..., 0, :] | (nibbles[..., 1, :] << 4)  # [panel, row, group, block, i]
    packed[:, _scale_bytes(groups) :] = both.transpose(0, 2, 3, 1, 4).reshape(panels, -1)
    return packed.reshape(-1)


def unpack_int4(packed: Bytes, rows: int, k: int) -> tuple[Codes, NDArray[np.float16]]:
    """The codes [rows, k] and scales [rows, k / 32] of `pack_int4`'s bytes."""
    panels, groups = _panels(rows), k // GROUP
    lines = packed.reshape(panels, _scale_bytes(groups) + k * PANEL // 2)
    scales = np.ascontiguousarray(lines[:, : groups * PANEL * 2]).view("<f2").reshape(panels, groups, PANEL)
    both = lines[:, _scale_bytes(groups) :].reshape(panels, groups, 4, PANEL, 4).transpose(0, 3, 1, 2, 4)
    nibbles = np.stack((both & 15, both >> 4), axis=-2).reshape(panels * PANEL, k)
    codes = nibbles.view(np.int8) - np.int8(8)
    return codes[:rows], scales.transpose(0, 2, 1).reshape(panels * PANEL, groups)[:rows]


def pack_int4_out(codes: Codes, scales: NDArray[np.float16]) -> Bytes:
    """Bytes of a matrix from codes [rows, k] in -8..7 and scales [rows / 32, k]: 32 rows share one for each column.

    Two panels after each other: the scales of their columns, fp16 [k], then both panels' codes as in `pack_int4`.

    Raises:
        ValueError: rows or k is no multiple of 32, the shapes do not match, or a code is outside -8..7.
    """
    rows, k = _checked(codes, GROUP)
    if rows % GROUP or scales.shape != (rows // GROUP, k):
        raise ValueError(f"scales {scales.shape} for codes {codes.shape}; expected one for each column and {GROUP} rows")
    panels = pack_int4(codes, np.zeros((rows, k // GROUP), np.float16)).reshape(rows // PANEL, -1)
    panels = panels[:, _scale_bytes(k // GROUP) :]
    lines = np.ascontiguousarray(scales.astype("<f2")).view(np.uint8).reshape(rows // GROUP, 2 * k)
    return np.concatenate((lines, panels.reshape(rows // GROUP, -1)), axis=1).reshape(-1)


def unpack_int4_out(packed: Bytes, rows: int, k: int) -> tuple[Codes, NDArray[np.float16]]:
    """The codes [rows, k] and scales [rows / 32, k] of `pack_int4_out`'s bytes."""
    lines = packed.reshape(rows // GROUP, 2 * k + k * GROUP // 2)
    scales = np.ascontiguousarray(lines[:, : 2 * k]).view("<f2").reshape(rows // GROUP, k)
    panels = np.zeros((rows // PANEL, _scale_bytes(k // GROUP) + k * PANEL // 2), np.uint8)
    panels[:, _scale_bytes(k // GROUP) :] = lines[:, 2 * k :].reshape(rows // PANEL, -1)
    return unpack_int4(panels.reshape(-1), rows, k)[0], scales


def pack_int8(codes: Codes, scales: NDArray[np.float32]) -> Bytes:
    """Bytes of a matrix from codes [rows, k] and one scale a row [rows].

    A panel is 16 fp32 scales, then for every 4 columns 64 bytes: byte 4 r + i holds row r's code i of the four.
    """
    rows, k = _checked(codes, GROUP)
    if scales.shape != (rows,):
        raise ValueError(f"scales {scales.shape}, expected {(rows,)} for codes {codes.shape}")
    panels = _panels(rows)
    packed = np.zeros((panels, PANEL * 4 + k * PANEL), np.uint8)
    packed[:, : PANEL * 4] = _padded(scales.astype("<f4")[:, None], panels).reshape(panels, PANEL).view(np.uint8)
    fours = _padded(codes, panels).reshape(panels, PANEL, k // 4, 4)
    packed[:, PANEL * 4 :] = fours.transpose(0, 2, 1, 3).reshape(panels, -1).view(np.uint8)
    return packed.reshape(-1)


def unpack_int8(packed: Bytes, rows: int, k: int) -> tuple[Codes, NDArray[np.float32]]:
    """The codes [rows, k] and scales [rows] of `pack_int8`'s bytes."""
    panels = _panels(rows)
    lines = packed.reshape(panels, PANEL * 4 + k * PANEL)
    scales = np.ascontiguousarray(lines[:, : PANEL * 4]).view("<f4").reshape(-1)
    codes = np.ascontiguousarray(lines[:, PANEL * 4 :]).view(np.int8).reshape(panels, k // 4, PANEL, 4)
    return codes.transpose(0, 2, 1, 3).reshape(panels * PANEL, k)[:rows], scales[:rows]


def _checked(codes: Codes, multiple: int) -> tuple[int, int]:
    rows, k = codes.shape
    if rows < 1 or k < 1 or k % multiple:
        raise ValueError(f"a matrix of {rows} x {k}; expected rows of a multiple of {multiple} weights")
    return rows, k


def _panels(rows: int) -> int:
    return -(-rows // PANEL)


def _scale_bytes(groups: int) -> int:
    return -(-groups * PANEL * 2 // ALIGNMENT) * ALIGNMENT


def _padded(values: NDArray, panels: int) -> NDArray:
    return np.pad(values, ((0, panels * PANEL - len(values)), (0, 0)))
