"""A quantized model in PyTorch with the runtime's arithmetic: the numbers of its packed file, in every architecture."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from kernels.runtime import PackedModel, Sampler
from modeling.generate import generate
from quant.apply import freeze
from quant.spec import QuantSpec
from stages.exact import suits, use_runtime_arithmetic
from tests.helpers.packed_models import CONFIGS, MIXTURES, build, packed

ALL = CONFIGS | MIXTURES


@pytest.fixture(scope="module", params=ALL)
def models(request, tmp_path_factory):
    """(plain, exact, packed path)"""
    plain, path = packed(ALL[request.param], tmp_path_factory.mktemp(request.param))
    exact = copy.deepcopy(plain)
    use_runtime_arithmetic(exact)
    return freeze(plain), freeze(exact), path


def ids(*shape, seed=0):
    return torch.randint(199, shape, generator=torch.Generator().manual_seed(seed))


def test_logits_are_the_packed_models(models):
    _, exact, path = models
    tokens = ids(2, 90)
    with torch.no_grad():
        logits = exact(tokens)
    with PackedModel(path) as file:
        for row in range(2):
            ours = torch.from_numpy(file.session(kv="f32").eval(tokens[row].tolist(), all_logits=True))
            # Only the logits' own product is torch's; nothing is rounded after it.
            assert (ours - logits[row]).abs().max() < 1e-5 * logits.abs().max()


def test_greedy_text_is_the_packed_models(models):
    _, exact, path = models
    with PackedModel(path) as file:
        for seed in range(5):
            prompt = ids(8, seed=seed).tolist()
            session, choose = file.session(kv="f32"), Sampler()
            logits, produced = session.eval(prompt), []
            for _ in range(32):
                produced.append(choose(logits))
                logits = session.eval(produced[-1:])
            assert produced == list(generate(exact, prompt, 32))


def test_it_stays_near_the_plain_model_and_shares_its_weights(models):
    plain, exact, _ = models
    tokens = ids(4, 60)
    with torch.no_grad():
        assert (exact(tokens) - plain(tokens)).abs().mean() < 2e-3 * plain(tokens).abs().max()
    assert exact.state_dict().keys() == plain.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(exact.state_dict().values(), plain.state_dict().values(), strict=True))


def test_packed_documents_go_the_plain_way(models):
    plain, exact, _ = models
    positions = torch.cat((torch.arange(20), torch.arange(30)))[None]
    tokens = ids(1, 50)
    with torch.no_grad():
        whole = exact(tokens, positions)
        assert (whole - plain(tokens, positions)).abs().mean() < 2e-3 * whole.abs().max()
        # the second document does not see the first
        assert (whole[:, 20:] - exact(tokens[:, 20:])).abs().mean() < 2e-3 * whole.abs().max()


def test_only_what_the_runtime_computes_goes_through_it():
    config = CONFIGS["plain"]
    assert suits(config, QuantSpec())
    for spec in (QuantSpec(weight_bits=8), QuantSpec(group_size=16), QuantSpec(activation_bits=16)):
        assert not suits(config, spec)


def test_a_loaded_qat_run_says_what_its_packed_file_says(tmp_path):
    from stages.export_packed import export_packed
    from stages.loading import load_model
    from stages.packed import load_packed
    from tests.helpers.stage_jobs import qat_checkpoint

    checkpoint = qat_checkpoint(tmp_path)
    export_packed(checkpoint, tmp_path / "model.pocket")
    loaded, file = load_model(checkpoint), load_packed(tmp_path / "model.pocket")
    tokens = torch.randint(loaded.model.config.vocab_size, (3, 32), generator=torch.Generator().manual_seed(1))
    labels = tokens.roll(-1, 1)
    labels[1, 20:] = -100
    ours, theirs = loaded.token_nll(tokens, None, labels), file.token_nll(tokens, None, labels)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert np.isfinite(ours).all() and file.tokenizer.fingerprint == loaded.tokenizer.fingerprint


def test_weights_that_are_no_numbers_give_no_answer(tmp_path):
    """The likeliest of log-likelihoods that are NaN is a number, and looks like a result."""
    from data_pipeline.tokenizer import Tokenizer
    from launch.evaluate import evaluate
    from launch.tasks import resolve_tasks
    from stages.errors import RunError
    from stages.export_packed import pack_model
    from stages.packed import generate_packed, load_packed

    tokenizer = Tokenizer.train(["to be or not to be"] * 20, 300)
    model = build(replace(CONFIGS["plain"], vocab_size=tokenizer.vocab_size))
    model.norm.weight.fill_(float("nan"))
    pack_model(model, tmp_path / "model.pocket", quant=QuantSpec(), tokenizer=tokenizer)
    (tmp_path / "text.txt").write_text("to be or not")
    loaded = load_packed(tmp_path / "model.pocket")
    with pytest.raises(RunError, match="not finite"):
        next(generate_packed(loaded, [1, 2], 4))
    with pytest.raises(RunError, match="not finite"):
        evaluate(loaded, resolve_tasks([str(tmp_path / "text.txt")]), None, tmp_path / "scores.json")
    assert not (tmp_path / "scores.json").exists()


@pytest.mark.parametrize("field", [{"block_repeat": 17}, {"norm_eps": 1.0}, {"norm_eps": 1e-60}, {"window": 2**24 + 1},
                                   {"max_positions": 2**25}, {"head_dim": 544}, {"ffn_size": 100}])  # fmt: skip
def test_what_the_loader_would_refuse_is_not_written(tmp_path, field):
    from stages.export_packed import NotPackable, pack_model

    model, (name, value) = build(CONFIGS["plain"]), next(iter(field.items()))
    model.config = replace(model.config, **field)
    with pytest.raises(NotPackable, match=f"model.{name}={value}"):
        pack_model(model, tmp_path / "model.pocket", quant=QuantSpec())
    assert not list(tmp_path.iterdir())


def test_the_largest_sizes_that_are_written_are_read(tmp_path):
    from stages.export_packed import pack_model

    model = build(replace(CONFIGS["plain"], num_layers=1, block_repeat=16, window=2**24, max_positions=2**24, norm_eps=0.999))
    pack_model(model, tmp_path / "model.pocket", quant=QuantSpec())
    with PackedModel(tmp_path / "model.pocket") as file:
        assert np.isfinite(file.session(8).eval([1, 2])).all()
