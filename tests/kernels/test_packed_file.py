"""A packed file from a stranger: every damage is refused with the field's name, and nothing crashes."""

from __future__ import annotations

import numpy as np
import pytest

from kernels.packed_file import HEADER, PackedFileError, is_packed, read_metadata, write_packed
from kernels.runtime import PackedModel, PackedModelError, crc32c
from tests.helpers.damage import checksum, flipped, model_field, replay_mutations, with_header, with_metadata
from tests.helpers.packed_models import CONFIGS, packed


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return packed(CONFIGS["flash"], tmp_path_factory.mktemp("good"))[1].read_bytes()


def first_tensor(**changes):
    return lambda data: with_metadata(data, lambda d: {**d, "tensors": [d["tensors"][0] | changes, *d["tensors"][1:]]})


DAMAGES = {
    "empty": (lambda data: b"", "0 bytes"),
    "a header cut off": (lambda data: data[:40], "40 bytes"),
    "cut": (lambda data: data[:-1], "file_bytes"),
    "grown": (lambda data: data + b"\0", "file_bytes"),
    "not one": (lambda data: b"GGUF" + data[4:], "magic"),
    "another version": (lambda data: with_header(data, version=2), "version: 2"),
    "big-endian": (lambda data: with_header(data, byte_order=0x04030201), "big-endian"),
    "no byte order": (lambda data: with_header(data, byte_order=7), "byte_order"),
    "header bits": (flipped(20), "header_crc32c"),
    "metadata bits": (flipped(80), "metadata_crc32c"),
    "tensor bits": (flipped(-70), "checksum"),
    "metadata outside": (lambda data: with_header(data, metadata_offset=2**63), "metadata_bytes"),
    "metadata too long": (lambda data: with_header(data, metadata_bytes=2**40), "metadata_bytes"),
    "data before metadata": (lambda data: with_header(data, data_offset=64), "data_offset"),
    "data unaligned": (lambda data: with_header(data, data_offset=len(data) // 64 * 64 - 32), "data_offset"),
    "no JSON": (lambda data: with_metadata(data, lambda d: b"{'model': 1}"), "metadata: not valid JSON"),
    "two values": (lambda data: with_metadata(data, lambda d: b"{} {}"), "metadata: not valid JSON"),
    "deep": (lambda data: with_metadata(data, lambda d: b"[" * 100_000), "metadata: not valid JSON"),
    "wide": (lambda data: with_metadata(data, lambda d: b"[" + b"1," * 2_000_000 + b"1]"), "metadata: not valid JSON"),
    "no tensors": (lambda data: with_metadata(data, lambda d: {"model": d["model"]}), "tensors: missing"),
    "tensors empty": (lambda data: with_metadata(data, lambda d: {**d, "tensors": []}), "tensors: 0"),
    "tensors of numbers": (lambda data: with_metadata(data, lambda d: {**d, "tensors": [1, 2]}), "no name"),
    "no model": (lambda data: with_metadata(data, lambda d: {"tensors": d["tensors"]}), "model: missing"),
    "a tensor missing": (
        lambda data: with_metadata(data, lambda d: {**d, "tensors": d["tensors"][1:]}), "tensor embed: missing"
    ),
    "overlap": (lambda data: with_metadata(data, lambda d: {**d, "tensors": [
        d["tensors"][0], d["tensors"][1] | {"offset": d["tensors"][0]["offset"]}, *d["tensors"][2:]]}), "overlaps"),
    "unaligned tensor": (first_tensor(offset=3), "offset"),
    "tensor far away": (first_tensor(offset=2**50), "offset"),
    "negative offset": (first_tensor(offset=-10**6), "whole number"),
    "tensor too long": (first_tensor(bytes=2**45), "offset"),
    "bytes of another shape": (first_tensor(bytes=64), "bytes: 64"),
    "absurd rows": (first_tensor(shape=[2**40, 64]), "shape"),
    "no rows": (first_tensor(shape=[0, 64]), "shape"),
    "three sizes": (first_tensor(shape=[1, 1, 64]), "shape"),
    "fractional shape": (first_tensor(shape=[1.5, 64]), "shape"),
    "odd width": (first_tensor(shape=[199, 63]), "multiple of 32"),
    "unknown encoding": (first_tensor(encoding="int3"), "encoding"),
    "a matrix of floats": (first_tensor(encoding="f32", bytes=199 * 64 * 4), "tensor embed"),
    "an endless name": (first_tensor(name="x" * 100_000), "missing"),
    "a name that is none": (first_tensor(name=7), "no name"),
    "absurd layers": (model_field("num_layers", 10**9), "model.num_layers"),
    "absurd positions": (model_field("max_positions", 2**40), "model.max_positions"),
    "no width": (model_field("hidden_size", 0), "model.hidden_size"),
    "another width": (model_field("hidden_size", 96), "shape"),
    "odd heads": (model_field("num_kv_heads", 4), "num_kv_heads"),
    "absurd heads": (model_field("head_dim", 10**6), "model.head_dim"),
    "a string": (model_field("ffn_size", "96"), "model.ffn_size"),
    "a negative": (model_field("window", -1), "model.window"),
    "no epsilon": (model_field("norm_eps", 0), "norm_eps"),
    "an epsilon that is 0 in fp32": (model_field("norm_eps", 1e-300), "norm_eps"),
    "a kind too few": (model_field("attention", ["full"]), "model.attention"),
    "an unknown kind": (model_field("attention", ["full", "skip", "sparse"]), "model.attention"),
    "a flag that is none": (model_field("qk_norm", 1), "model.qk_norm"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_refused_by_name(good, tmp_path, name):
    change, words = DAMAGES[name]
    path = tmp_path / "model.pocket"
    path.write_bytes(change(good))
    with pytest.raises(PackedModelError, match=words.replace("(", r"\(")) as refused:
        PackedModel(path)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 400


def test_an_undamaged_file_rebuilt_by_these_tools_loads(good, tmp_path):
    path = tmp_path / "model.pocket"
    path.write_bytes(with_metadata(good, lambda d: d | {"later": {"key": [1.5e3, "\\u00e9", None, True]}}))
    with PackedModel(path) as file:
        assert file.metadata()["later"]["key"][1] == "é" or file.metadata()["later"]["key"][1] == "\\u00e9"
    path.write_bytes(flipped(-70)(good))
    PackedModel(path, verify=False).close()  # checksums of tensors are the caller's choice


def test_mutated_files_never_crash_the_loader(good, tmp_path):
    """A fast replay: seeded mutations, with checksums put right, in a process of their own."""
    counts = replay_mutations(good, tmp_path)
    assert counts["silent"] == 0 and counts["refused"] > 100 and counts["computed"] > 20


def test_a_hostile_file_cannot_ask_for_much_memory(good, tmp_path):
    """A claim of 2^24 positions is legal; only a session that asks for them pays."""
    path = tmp_path / "model.pocket"
    path.write_bytes(model_field("max_positions", 2**24)(good))
    with PackedModel(path) as file:
        assert file.session(64).kv_bytes < 2**20


def test_the_writer_overwrites_nothing_and_leaves_nothing_half_written(tmp_path):
    from kernels.packed_file import f32

    path = tmp_path / "file.pocket"
    write_packed(path, {"format": "x"}, [lambda: f32("a", np.ones(3, np.float32))], crc32c)
    assert is_packed(path) and read_metadata(path)["tensors"][0]["shape"] == [3]
    with pytest.raises(PackedFileError, match="nothing is overwritten"):
        write_packed(path, {}, [], crc32c)

    def fail():
        raise RuntimeError("out of weights")

    with pytest.raises(RuntimeError, match="out of weights"):
        write_packed(tmp_path / "other.pocket", {}, [fail], crc32c)
    assert sorted(item.name for item in tmp_path.iterdir()) == ["file.pocket"]


@pytest.mark.parametrize("content", [b"", b"PKTFORGE", b"PKTFORGE" + b"\xff" * 100, b"hello" * 30])
def test_metadata_of_what_is_no_packed_file_is_refused(tmp_path, content):
    path = tmp_path / "x"
    path.write_bytes(content)
    with pytest.raises(PackedFileError, match="x: "):
        read_metadata(path)


@pytest.mark.parametrize("text", [b'"\xff\xfe"', b'"\\q"', b"1" + b"0" * 5000])
def test_metadata_that_only_the_loader_passes_over_is_refused_in_python(good, tmp_path, text):
    """The loader looks at what it needs; a stray string or number elsewhere must not end in a traceback."""
    path = tmp_path / "x"
    path.write_bytes(with_metadata(good, lambda d: {**d, "stray": "@" * len(text)}))
    data = path.read_bytes()
    start, size = HEADER.unpack(data[:60])[4:6]
    changed = data[start : start + size].replace(b'"' + b"@" * len(text) + b'"', text + b"  ")
    path.write_bytes(with_header(data[:start] + changed + data[start + size :], metadata_crc32c=checksum(changed)))
    with PackedModel(path) as model, pytest.raises(PackedModelError, match="x: metadata: "):
        model.metadata()
    with pytest.raises(PackedFileError, match="x: "):
        read_metadata(path)


def test_checksums_are_castagnolis():
    assert crc32c(np.frombuffer(b"123456789", np.uint8)) == 0xE3069283
    data = np.random.default_rng(0).integers(0, 256, 1001, dtype=np.uint8)

    def slow(data):
        crc = 0xFFFFFFFF
        for byte in data.tolist():
            crc ^= byte
            for _ in range(8):
                crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
        return crc ^ 0xFFFFFFFF

    assert crc32c(data) == slow(data) and crc32c(data[500:], crc32c(data[:500])) == crc32c(data)
