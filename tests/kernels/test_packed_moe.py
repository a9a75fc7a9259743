"""A packed mixture of experts from a stranger: every damage is refused with the field's name, and nothing crashes."""

from __future__ import annotations

import json

import numpy as np
import pytest

from kernels.packed_file import HEADER
from kernels.runtime import PackedModel, PackedModelError
from quant.spec import QuantSpec
from tests.helpers.damage import checksum, model_field, replay_mutations, with_metadata
from tests.helpers.packed_models import mixture, packed

MOE = dict(num_experts=3, top_k=2, expert_size=32, shared_size=64, score="sigmoid", normalize=True, route_scale=1.0,
           dense_layers=1)  # fmt: skip


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return packed(mixture(layers=2, **MOE), tmp_path_factory.mktemp("good"))[1].read_bytes()


@pytest.fixture(scope="module")
def by_output(tmp_path_factory):
    spec = QuantSpec(expert_axis="output")
    return packed(mixture(layers=2, **MOE), tmp_path_factory.mktemp("by_output"), spec=spec)[1].read_bytes()


def field(name, value):
    return model_field("moe", MOE | {name: value})


def without(name):
    return model_field("moe", {key: value for key, value in MOE.items() if key != name})


def tensor(name, change):
    """`change` takes the entry of a tensor to the entries that replace it."""
    return lambda data: with_metadata(data, lambda d: {**d, "tensors": [
        new for entry in d["tensors"] for new in (change(entry) if entry["name"] == name else [entry])]})


def swapped(first, second):
    """Two tensors change their places in the file."""
    def change(document):
        entries = {entry["name"]: entry for entry in document["tensors"]}
        one, two = dict(entries[first]), dict(entries[second])
        for name, place in ((first, two), (second, one)):
            entries[name].update({key: place[key] for key in ("offset", "bytes", "crc32c")})
        return document

    return lambda data: with_metadata(data, change)


def value_of(name, value):
    """The first float of a tensor, with its checksum right."""
    def change(data):
        start, size = HEADER.unpack(data[:60])[4:6]
        entry = next(e for e in json.loads(data[start : start + size])["tensors"] if e["name"] == name)
        end = entry["offset"] + entry["bytes"]
        floats = np.frombuffer(data[entry["offset"] : end], "<f4").copy()
        floats[0] = value
        changed = data[: entry["offset"]] + floats.tobytes() + data[end:]
        return tensor(name, lambda e: [e | {"crc32c": checksum(floats.tobytes())}])(changed)

    return change


DAMAGES = {
    "no object": (model_field("moe", [1, 2]), "model.moe: not an object"),
    "nothing": (model_field("moe", None), "model.moe: not an object"),
    "no experts": (field("num_experts", 0), "model.moe.num_experts"),
    "absurd experts": (field("num_experts", 10**9), "model.moe.num_experts"),
    "more experts than tensors": (field("num_experts", 4000), "model.moe.num_experts"),
    "an expert too many": (field("num_experts", 4), "router: shape"),
    "no choice": (field("top_k", 0), "model.moe.top_k"),
    "more than there are": (field("top_k", 4), "model.moe.top_k: 4 is more than num_experts, 3"),
    "absurd choices": (field("top_k", 10**6), "model.moe.top_k"),
    "a fraction": (field("top_k", 1.5), "model.moe.top_k"),
    "another width": (field("expert_size", 64), "experts.0.gate_up: shape"),
    "an odd width": (field("expert_size", 40), "model.moe.expert_size: 40 is not a multiple of 32"),
    "no width": (field("expert_size", 0), "model.moe.expert_size"),
    "absurd width": (field("expert_size", 2**40), "model.moe.expert_size"),
    "another shared width": (field("shared_size", 32), "feed_forward.gate_up: shape"),
    "an odd shared width": (field("shared_size", 48), "model.moe.shared_size: 48"),
    "a negative": (field("shared_size", -32), "model.moe.shared_size"),
    "more dense layers than layers": (field("dense_layers", 3), "model.moe.dense_layers"),
    "another dense layer": (field("dense_layers", 0), "tensor blocks.0.feed_forward.router: missing"),
    "an unknown score": (field("score", "tanh"), "model.moe.score"),
    "a score that is none": (field("score", 1), "model.moe.score"),
    "a flag that is none": (field("normalize", 1), "model.moe.normalize"),
    "no scale": (field("route_scale", 0), "model.moe.route_scale"),
    "a scale that fp32 has not": (field("route_scale", 1e39), "model.moe.route_scale"),
    "a scale that is 0 in fp32": (field("route_scale", 1e-60), "model.moe.route_scale"),
    "a router missing": (tensor("blocks.1.feed_forward.router", lambda e: []), "tensor blocks.1.feed_forward.router: missing"),
    "a bias missing": (tensor("blocks.1.feed_forward.router_bias", lambda e: []), "router_bias: missing"),
    "an expert missing": (tensor("blocks.1.experts.2.down", lambda e: []), "tensor blocks.1.experts.2.down: missing"),
    "the shared one missing": (tensor("blocks.1.feed_forward.down", lambda e: []), "feed_forward.down: missing"),
    "a flat router": (tensor("blocks.1.feed_forward.router", lambda e: [e | {"shape": [3 * 64]}]), "router: shape"),
    "a router of codes": (
        tensor("blocks.1.feed_forward.router", lambda e: [e | {"encoding": "bytes", "shape": [e["bytes"]]}]), "router: shape"
    ),
    "a bias of no number": (value_of("blocks.1.feed_forward.router_bias", float("nan")), "router_bias: a value"),
    "an infinite router": (value_of("blocks.1.feed_forward.router", float("-inf")), "router: a value"),
    "an expert in two places": (swapped("blocks.1.experts.0.down", "blocks.1.experts.1.down"), "experts.0.down: offset"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_refused_by_name(good, tmp_path, name):
    change, words = DAMAGES[name]
    path = tmp_path / "model.pocket"
    path.write_bytes(change(good))
    with pytest.raises(PackedModelError, match=words) as refused:
        PackedModel(path)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 400


@pytest.mark.parametrize("name, change, words", [
    ("blocks.1.feed_forward.down", {"encoding": "int4_g32_out"}, "int4_g32_out is for routed experts"),
    ("blocks.1.experts.1.gate_up", {"encoding": "int4_g32"}, "some experts are int4_g32_out, and some are not"),
    ("blocks.1.experts.0.gate_up", {"shape": [48, 64]}, "takes a multiple of 32"),
    ("blocks.1.experts.0.gate_up", {"shape": [32, 32768]}, "of at most 16384"),
    ("blocks.1.experts.0.gate_up", {"shape": [96, 64]}, "bytes"),
])  # fmt: skip
def test_damage_to_groups_along_the_outputs_is_refused_by_name(by_output, tmp_path, name, change, words):
    path = tmp_path / "model.pocket"
    path.write_bytes(tensor(name, lambda entry: [entry | change])(by_output))
    with pytest.raises(PackedModelError, match=words):
        PackedModel(path)


@pytest.mark.parametrize("fields", [{"top_k": 3}, {"score": "softmax"}, {"normalize": False}, {"route_scale": 2.5}])
def test_what_the_tensors_allow_is_read(good, tmp_path, fields):
    path = tmp_path / "model.pocket"
    path.write_bytes(model_field("moe", MOE | fields)(good))
    with PackedModel(path) as file:
        assert (file.info.num_experts, file.info.moe_layers, file.info.top_k) == (3, 1, fields.get("top_k", 2))
        assert np.isfinite(file.session().eval([1, 2, 3])).all()


def test_a_row_that_is_no_number_has_experts_that_exist(good, tmp_path):
    path = tmp_path / "model.pocket"
    path.write_bytes(value_of("blocks.1.feed_forward_norm", float("nan"))(good))
    with PackedModel(path) as file:
        session = file.session()
        assert len(session.eval([1, 2, 3])) == 199
        assert session.experts().hits.sum() == 6


@pytest.mark.parametrize("kind", ["good", "by_output"])
def test_mutated_files_never_crash_the_loader(kind, request, tmp_path):
    counts = replay_mutations(request.getfixturevalue(kind), tmp_path)
    assert counts["silent"] == 0 and counts["refused"] > 100 and counts["computed"] > 20
