"""The C++ runtime against the fake-quantized decoder, and its kernel variants against each other."""

from __future__ import annotations

import copy
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from kernels.packed_layout import unpack_int4
from kernels.runtime import PackedModel, PackedModelError, Sampler, executable_path, isas
from quant.apply import convert
from tests.helpers.exact_reference import ExactModel
from tests.helpers.packed_models import CONFIGS, packed

HERE = [name for name, runs in isas().items() if runs]


def prompt(length, seed=0, vocab=199):
    return torch.randint(vocab, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.fixture(scope="module", params=CONFIGS)
def model_and_path(request, tmp_path_factory):
    return packed(CONFIGS[request.param], tmp_path_factory.mktemp(request.param))


def test_codes_and_scales_are_those_of_training(model_and_path):
    model, path = model_and_path
    with PackedModel(path) as file:
        entries = {entry["name"]: entry for entry in file.metadata()["tensors"]}
        found = {name: unpack_int4(np.frombuffer(file.tensor(name), np.uint8), *entry["shape"])
                 for name, entry in entries.items() if entry["encoding"] == "int4_g32"}
    fused = {"q": ("qkv", 0), "k": ("qkv", 1), "v": ("qkv", 2), "o": ("out", 0), "gate": ("gate_up", 0), "up": ("gate_up", 1)}
    checked = 0
    rows_before: dict[str, int] = {}
    for name, (codes, scales) in convert(model).items():
        parts = name.removesuffix(".weight").split(".")
        target = ".".join([*parts[:-1], fused.get(parts[-1], (parts[-1], 0))[0]])
        start = rows_before.get(target, 0)
        rows_before[target] = start + len(codes)
        assert np.array_equal(found[target][0][start : start + len(codes)], codes.numpy()), name
        assert np.array_equal(found[target][1][start : start + len(codes)], scales.numpy()), name
        checked += 1
    assert checked == len(convert(model)) and {name: len(codes) for name, (codes, _) in found.items()} == rows_before


@pytest.mark.parametrize("isa", HERE)
def test_logits_are_those_of_the_qat_models_codes_to_the_last_bit(model_and_path, isa):
    model, path = model_and_path
    ids = prompt(70)
    expected = ExactModel(model)(torch.tensor(ids)).numpy()
    with PackedModel(path, isa) as file:
        logits = file.session(kv="f32", batch=37).eval(ids, all_logits=True)
    assert np.array_equal(logits, expected)


def test_a_plain_forward_pass_differs_no_more_than_from_itself_in_other_precision(model_and_path):
    """Rounded activations amplify the last bit, so two right answers differ; ours must not differ more (docs/runtime.md)."""
    model, path = model_and_path
    ids = torch.stack([torch.tensor(prompt(60, seed)) for seed in range(8)])
    plain = model(ids)
    double = copy.deepcopy(model).double()(ids).float()
    with PackedModel(path) as file:
        ours = torch.from_numpy(np.stack([file.session(kv="f32").eval(row, all_logits=True) for row in ids.tolist()]))
    floor = (plain - double).abs().mean()
    assert (ours - plain).abs().mean() < 5 * floor + 1e-6
    assert (ours - plain).abs().mean() < 2e-3 * plain.abs().max()


@pytest.mark.parametrize("kv", ["f32", "f16", "int8"])
def test_every_variant_gives_the_bits_of_the_reference(model_and_path, kv):
    _, path = model_and_path
    ids = prompt(90, seed=1)
    results = {}
    for isa in HERE:
        with PackedModel(path, isa) as file:
            session = file.session(kv=kv)
            results[isa] = [session.eval(ids[:60], all_logits=True), *(session.eval([token]) for token in ids[60:])]
    for isa in HERE:
        for ours, reference in zip(results[isa], results["ref"], strict=True):
            assert np.array_equal(ours.view(np.uint32), reference.view(np.uint32)), isa


@pytest.mark.parametrize("kv", ["f32", "f16", "int8"])
def test_batches_and_threads_change_no_bit(model_and_path, kv):
    _, path = model_and_path
    ids = prompt(70, seed=2)
    with PackedModel(path) as file:
        whole = file.session(kv=kv).eval(ids)
        for batch, threads in ((1, 1), (7, 1), (16, 2), (64, 5)):
            assert np.array_equal(file.session(kv=kv, batch=batch, threads=threads).eval(ids), whole)
        session = file.session(kv=kv, threads=2)
        for token in ids:
            last = session.eval([token])
        assert np.array_equal(last, whole) and session.length == len(ids)
        session.reset()
        assert np.array_equal(session.eval(ids), whole)


def test_int8_and_f16_caches_stay_near_f32(model_and_path):
    _, path = model_and_path
    ids = prompt(100, seed=3)
    with PackedModel(path) as file:
        logits = {kv: file.session(kv=kv).eval(ids, all_logits=True) for kv in ("f32", "f16", "int8")}
        sizes = {kv: file.session(kv=kv).kv_bytes for kv in ("f32", "f16", "int8")}
    largest = np.abs(logits["f32"]).max()
    assert np.abs(logits["f16"] - logits["f32"]).mean() < 0.01 * largest
    assert 0 < np.abs(logits["int8"] - logits["f32"]).mean() < 0.03 * largest
    assert sizes["f32"] == 2 * sizes["f16"] > 3 * sizes["int8"]


def test_greedy_tokens_are_the_likeliest_of_the_qat_models_codes(model_and_path):
    model, path = model_and_path
    exact = ExactModel(model)
    with PackedModel(path) as file:
        for seed in range(3):
            ids = prompt(8, seed=100 + seed)
            session, choose = file.session(kv="f32"), Sampler()
            logits, produced = session.eval(ids), []
            for _ in range(32):
                produced.append(choose(logits))
                logits = session.eval(produced[-1:])
            expected = exact(torch.tensor(ids + produced[:-1]))[7:].argmax(-1)
            assert produced == expected.tolist()


def test_nll_is_that_of_the_logits(model_and_path):
    _, path = model_and_path
    ids, labels = prompt(50, seed=4), prompt(50, seed=5)
    labels[3] = labels[49] = -100
    with PackedModel(path) as file:
        logits = torch.from_numpy(file.session().eval(ids, all_logits=True))
        nll = torch.from_numpy(file.session(batch=20).nll(ids, labels))
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor(labels), reduction="none")
    torch.testing.assert_close(nll, expected, atol=2e-6, rtol=2e-6)
    assert nll[3] == 0 and nll[49] == 0


def test_int8_embedding_and_head(tmp_path):
    model, path = packed(CONFIGS["untied_norms"], tmp_path, embedding="int8")
    ids = prompt(40)
    results = {}
    for isa in HERE:
        with PackedModel(path, isa) as file:
            assert {e["name"] for e in file.metadata()["tensors"] if e["encoding"] == "int8_row"} == {"embed", "head"}
            results[isa] = file.session(kv="f32").eval(ids, all_logits=True)
        assert np.array_equal(results[isa], results["ref"])
    # Eight bits are nearer to the weights than training's four: the decoder without rounding of either is the reference.
    from modeling.layers import Embedding, Linear

    for name in ("embed", "head"):
        module = getattr(model, name)
        scale = (module.weight.abs().amax(1, keepdim=True) * (2 / 255)).half().float()
        with torch.no_grad():
            module.weight.copy_((module.weight / scale).round().clamp(-128, 127) * scale)
    model.embed.__class__ = Embedding
    model.head.rounded = lambda weight: weight
    assert isinstance(model.head, Linear)
    expected = model(torch.tensor([ids]))[0]
    assert np.abs(results["ref"] - expected.numpy()).mean() < 1e-3 * expected.abs().max()


def test_a_head_that_training_rounded_keeps_its_codes_where_the_embedding_was_left_alone(tmp_path):
    from modeling.decoder import Decoder
    from modeling.init import init_weights
    from quant.apply import prepare
    from quant.spec import QuantSpec
    from stages.export_packed import pack_model

    spec, model = QuantSpec(embedding=False), Decoder(CONFIGS["untied_norms"])
    init_weights(model, 0)
    prepare(model, spec)
    pack_model(model, tmp_path / "model.pocket", quant=spec)
    with PackedModel(tmp_path / "model.pocket") as file:
        entries = {entry["name"]: entry for entry in file.metadata()["tensors"]}
        assert entries["embed"]["encoding"] == "int8_row" and entries["head"]["encoding"] == "int4_g32"
        codes, _ = unpack_int4(np.frombuffer(file.tensor("head"), np.uint8), *entries["head"]["shape"])
    assert np.array_equal(codes, convert(model)["head.weight"][0].numpy())


def test_what_makes_no_sense_is_refused(model_and_path):
    _, path = model_and_path
    with PackedModel(path) as file:
        session = file.session(16)
        for tokens, message in (([], "0 tokens"), ([199], "expected 0 to 198"), ([-1], "expected 0 to 198"),
                                ([1] * 17, "context of 16")):
            with pytest.raises(PackedModelError, match=message):
                session.eval(tokens)
        assert session.length == 0
        session.eval([1] * 16)
        with pytest.raises(PackedModelError, match="1 tokens after 16"):
            session.eval([1])
        for options, message in (
            ({"context": 161}, "max_positions, 160"), ({"context": -1}, "context=-1"), ({"threads": 0}, "1 to 256"),
            ({"threads": 257}, "1 to 256"), ({"kv": "f8"}, "f32, f16, int8"), ({"batch": -1}, "batch=-1"),
        ):  # fmt: skip
            with pytest.raises(PackedModelError, match=message):
                file.session(**options)
    with pytest.raises(PackedModelError, match="this build has ref"):
        PackedModel(path, "sse2")
    with pytest.raises(PackedModelError, match="No such file"):
        PackedModel(path.with_name("none.pocket"))


def test_ids_are_read_as_they_are_meant_or_refused(model_and_path):
    """What an array holds in memory (steps, width) is not what the library reads: it takes 32-bit ids in a row."""
    _, path = model_and_path
    every = np.arange(24, dtype=np.int32)
    with PackedModel(path) as file:
        session = file.session()
        for given in (every[::2], every[::2].astype(np.int64), torch.arange(0, 24, 2)):
            session.reset()
            logits = session.eval(given)
            session.reset()
            assert np.array_equal(logits, session.eval(list(range(0, 24, 2)))), given
        session.reset()
        steps = session.nll(every[::2], every[1::2])
        session.reset()
        assert np.array_equal(steps, session.nll(list(range(0, 24, 2)), list(range(1, 24, 2))))
        for bad in (np.array([2**32 + 1]), [1.5], [[1, 2], [3, 4]], 3, "12", None, [-(2**40)]):
            with pytest.raises(PackedModelError, match="expected"):
                session.eval(bad)
        assert session.length == 12
        for wrong in ({"context": 0}, {"context": 2**40}, {"threads": 2**32 + 1}):
            with pytest.raises(PackedModelError, match=next(iter(wrong))):
                file.session(**wrong)
        with pytest.raises(PackedModelError, match="one token's row"):
            Sampler()(np.zeros((2, 3), np.float32))


def test_what_is_closed_is_refused_and_a_model_waits_for_its_sessions(model_and_path):
    _, path = model_and_path
    model = PackedModel(path)
    session, other = model.session(), model.session()
    session.close()
    uses = [lambda: session.eval([1]), lambda: session.nll([1], [2]), lambda: session.length, session.clocks, session.reset]
    with ThreadPoolExecutor(4) as threads:
        futures = [threads.submit(other.eval, prompt(30)) for _ in range(20)]
        model.close()
    for future in futures:  # whole, or refused: closed, or (the calls take turns) full
        assert future.exception() is None or isinstance(future.exception(), PackedModelError)
    uses += [lambda: other.eval([1]), model.metadata, lambda: model.tensor("norm"), model.session]
    for use in uses:
        with pytest.raises(PackedModelError, match="is closed"):
            use()
    model.close()


def test_the_program_takes_no_number_for_another(model_and_path, tmp_path):
    _, path = model_and_path
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for arguments, words in (
        ([str(path), "--ids", "4294967297"], "--ids: expected"), ([str(path), "--ids", "1,"], "--ids: expected"),
        ([str(path), "--ids", ""], "--ids: expected"), ([str(path), "--bandwidth-mib", "x"], "--bandwidth-mib x"),
        ([str(path), "--threads"], "--threads"), ([str(path), "--toast", "1"], "no such option"), ([], "MODEL is missing"),
        ([str(path), "--context", "5", "--ids", "1,2,3", "--decode-tokens", "4"], "do not fit the context of 5"),
        ([str(pipe)], "not a regular file"),
    ):  # fmt: skip
        done = subprocess.run([executable_path(), *arguments], capture_output=True, text=True, timeout=20)
        assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1) and words in done.stderr, done
    if os.path.exists("/dev/full"):
        with open("/dev/full", "w") as full:
            assert subprocess.run([executable_path(), path, "--ids", "1"], stdout=full, stderr=subprocess.PIPE).returncode == 1


def test_more_threads_than_cores_are_allowed(model_and_path):
    _, path = model_and_path
    with PackedModel(path) as file:
        assert np.array_equal(file.session(threads=13).eval(prompt(20)), file.session().eval(prompt(20)))


def test_sampling_is_seeded_and_follows_the_distribution():
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    one, other = Sampler(1.0, 1.0, 7), Sampler(1.0, 1.0, 7)
    draws = [one(logits) for _ in range(20_000)]
    assert draws[:100] == [other(logits) for _ in range(100)]
    assert np.allclose(np.bincount(draws, minlength=4) / len(draws), [0.5, 0.3, 0.15, 0.05], atol=0.012)
    nucleus = Sampler(1.0, 0.7, 3)
    kept = np.bincount([nucleus(logits) for _ in range(5_000)], minlength=4)
    assert kept[2] == kept[3] == 0 and abs(kept[0] / 5_000 - 0.5 / 0.8) < 0.03
    assert Sampler()(np.array([1.0, 3.0, 3.0], np.float32)) == 1


def test_kernels_that_are_not_here_are_named_with_those_that_are(model_and_path, monkeypatch):
    monkeypatch.setenv("POCKETFORGE_ISA", "sse9")
    with pytest.raises(PackedModelError, match="POCKETFORGE_ISA=sse9; this machine has ref"):
        PackedModel(model_and_path[1])
