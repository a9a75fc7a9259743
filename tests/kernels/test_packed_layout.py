"""The bytes of a packed matrix against the specification's words, one weight at a time."""

from __future__ import annotations

import numpy as np
import pytest

from kernels import packed_layout as layout

SHAPES = [(1, 32), (16, 32), (17, 64), (48, 96), (33, 160)]


def int4_matrix(rows, k, seed=0):
    generator = np.random.default_rng(seed)
    codes = generator.integers(-8, 8, (rows, k), dtype=np.int8)
    scales = generator.random((rows, k // 32)).astype(np.float16)
    return codes, scales


@pytest.mark.parametrize(("rows", "k"), SHAPES)
def test_every_int4_code_and_scale_lies_where_the_format_says(rows, k):
    codes, scales = int4_matrix(rows, k)
    packed = layout.pack_int4(codes, scales)
    scale_bytes = -(-(k // 32) * 32 // 64) * 64
    panel_bytes = scale_bytes + k * 8
    assert packed.nbytes == -(-rows // 16) * panel_bytes and packed.nbytes % 64 == 0
    for row in range(-(-rows // 16) * 16):
        panel = packed[row // 16 * panel_bytes :][:panel_bytes]
        r = row % 16
        for column in range(k):
            group, within = divmod(column, 32)
            byte = panel[scale_bytes + group * 256 + within // 8 * 64 + 4 * r + within % 4]
            code = int(byte >> 4 if within % 8 >= 4 else byte & 15) - 8
            assert code == (codes[row, column] if row < rows else 0)
            scale = panel[(group * 16 + r) * 2 :][:2].view("<f2")[0]
            assert scale == (scales[row, group] if row < rows else 0)


@pytest.mark.parametrize(("rows", "k"), [(32, 32), (64, 96), (96, 160)])
def test_groups_along_the_outputs_lie_where_the_format_says_and_come_back(rows, k):
    generator = np.random.default_rng(0)
    codes = generator.integers(-8, 8, (rows, k), dtype=np.int8)
    scales = generator.random((rows // 32, k)).astype(np.float16)
    packed = layout.pack_int4_out(codes, scales)
    pair_bytes = 2 * k + 16 * k
    assert packed.nbytes == rows // 32 * pair_bytes and packed.nbytes % 64 == 0
    for row in range(rows):
        pair = packed[row // 32 * pair_bytes :][:pair_bytes]
        panel = pair[2 * k + row % 32 // 16 * 8 * k :]
        for column in range(k):
            group, within = divmod(column, 32)
            byte = panel[group * 256 + within // 8 * 64 + 4 * (row % 16) + within % 4]
            assert int(byte >> 4 if within % 8 >= 4 else byte & 15) - 8 == codes[row, column]
    assert np.array_equal(packed.reshape(-1, pair_bytes)[:, : 2 * k].reshape(-1).view("<f2").reshape(scales.shape), scales)
    for ours, back in zip((codes, scales), layout.unpack_int4_out(packed, rows, k), strict=True):
        assert np.array_equal(ours, back)
    with pytest.raises(ValueError, match="expected one for each column"):
        layout.pack_int4_out(codes[:16], scales)


@pytest.mark.parametrize(("rows", "k"), SHAPES)
def test_int4_comes_back(rows, k):
    codes, scales = int4_matrix(rows, k)
    for ours, back in zip((codes, scales), layout.unpack_int4(layout.pack_int4(codes, scales), rows, k), strict=True):
        assert np.array_equal(ours, back)


@pytest.mark.parametrize(("rows", "k"), SHAPES)
def test_every_int8_code_lies_where_the_format_says_and_comes_back(rows, k):
    generator = np.random.default_rng(1)
    codes = generator.integers(-128, 128, (rows, k), dtype=np.int8)
    scales = generator.random(rows).astype(np.float32)
    packed = layout.pack_int8(codes, scales)
    panel_bytes = 64 + 16 * k
    for row in range(rows):
        panel = packed[row // 16 * panel_bytes :][:panel_bytes]
        assert panel[: 64].view("<f4")[row % 16] == scales[row]
        for column in range(k):
            assert panel[64 + column // 4 * 64 + 4 * (row % 16) + column % 4].view(np.int8) == codes[row, column]
    for ours, back in zip((codes, scales), layout.unpack_int8(packed, rows, k), strict=True):
        assert np.array_equal(ours, back)


@pytest.mark.parametrize(
    ("codes", "scales"),
    [
        (np.zeros((4, 33), np.int8), np.zeros((4, 1), np.float16)),
        (np.zeros((4, 64), np.int8), np.zeros((4, 1), np.float16)),
        (np.full((4, 32), 8, np.int8), np.zeros((4, 1), np.float16)),
        (np.full((4, 32), -9, np.int8), np.zeros((4, 1), np.float16)),
        (np.zeros((0, 32), np.int8), np.zeros((0, 1), np.float16)),
    ],
)
def test_what_the_layout_cannot_hold_is_refused(codes, scales):
    with pytest.raises(ValueError, match="expected"):
        layout.pack_int4(codes, scales)
