"""Mixtures of experts in the C++ runtime against a restatement in plain PyTorch, and its variants against each other."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kernels import ops
from kernels.runtime import PackedModel, isas
from modeling.moe_config import MoEConfig
from tests.helpers import exact_routing
from tests.helpers.exact_floats import fma
from tests.helpers.exact_reference import ExactModel
from tests.helpers.packed_models import CONFIGS, MIXTURES, packed

HERE = [name for name, runs in isas().items() if runs]


def prompt(length, seed=0):
    return torch.randint(199, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.fixture(scope="module", params=MIXTURES)
def mixture(request, tmp_path_factory):
    """(model, its file, 34 ids, the restatement's logits of them all)"""
    model, path = packed(MIXTURES[request.param], tmp_path_factory.mktemp(request.param))
    ids = prompt(34)
    return model, path, ids, ExactModel(model)(torch.tensor(ids)).numpy()


@pytest.mark.parametrize("isa", HERE)
def test_logits_are_those_of_the_restatement_to_the_last_bit(mixture, isa):
    _, path, ids, expected = mixture
    with PackedModel(path, isa) as file:
        for length in (1, 2, 7, 33):
            logits = file.session(kv="f32").eval(ids[:length], all_logits=True)
            assert np.array_equal(logits, expected[:length]), length
        session = file.session(kv="f32")
        session.eval(ids[:33])
        assert np.array_equal(session.eval(ids[33:]), expected[33])


@pytest.mark.parametrize("isa", HERE)
def test_single_steps_batches_and_threads_give_the_same_bits(mixture, isa):
    _, path, ids, expected = mixture
    with PackedModel(path, isa) as file:
        for threads in (1, 2, 3):
            session = file.session(kv="f32", threads=threads)
            assert np.array_equal(np.stack([session.eval([token]) for token in ids]), expected)
            for batch in (5, 13):
                found = file.session(kv="f32", threads=threads, batch=batch).eval(ids, all_logits=True)
                assert np.array_equal(found, expected), (threads, batch)


def test_prompts_of_more_pairs_than_go_through_at_once(tmp_path):
    """Experts are taken in groups of 128 pairs: here there are several, and one of an expert alone."""
    _, path = packed(MIXTURES["softmax"], tmp_path)
    ids = prompt(150, seed=4)
    results = []
    for isa in HERE:
        with PackedModel(path, isa) as file:
            session = file.session(kv="f32", threads=1)
            steps = np.stack([session.eval([token]) for token in ids])
            for threads in (1, 2):
                results.append(file.session(kv="f32", threads=threads).eval(ids, all_logits=True))
                assert np.array_equal(results[-1], steps), (isa, threads)
    assert all(np.array_equal(result, results[0]) for result in results)


def test_hits_are_the_choices_of_the_routers(mixture):
    model, path, ids, _ = mixture
    moe = model.config.moe
    with PackedModel(path) as file:
        session = file.session(kv="f32", batch=8)
        session.eval(ids)
        use = session.experts()
        assert use.hits.shape == (model.config.num_moe_layers, moe.num_experts) and use.tokens == len(ids)
        assert np.all(use.hits.sum(1) == len(ids) * moe.top_k) and use.hits.max() <= len(ids)
        before = session.experts().read_bytes
        assert before % file.info.expert_bytes == 0
        session.eval([1])
        assert session.experts().read_bytes - before == moe.top_k * file.info.moe_layers * file.info.expert_bytes
        active = file.info.decode_bytes
    entries = {entry["name"]: entry["bytes"] for entry in file_entries(path)}
    idle = sum(size for name, size in entries.items() if ".experts." in name and int(name.split(".")[3]) >= moe.top_k)
    matrices = sum(size for name, size in entries.items() if "norm" not in name and "rope" not in name and "bias" not in name)
    assert active == matrices - idle  # the embedding is the head


def file_entries(path):
    with PackedModel(path) as file:
        return file.metadata()["tensors"]


def test_a_dense_model_has_no_experts_to_speak_of(tmp_path):
    _, path = packed(CONFIGS["plain"], tmp_path)
    with PackedModel(path) as file:
        session = file.session()
        session.eval([1, 2, 3])
        assert session.experts().hits.size == 0 and session.experts().read_bytes == 0
        assert file.info.num_experts == file.info.expert_bytes == 0


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize("experts", [1, 2, 5, 16, 60, 65])
def test_router_logits_add_up_in_the_restatements_order(isa, experts, monkeypatch):
    monkeypatch.setenv("POCKETFORGE_ISA", isa)
    generator = torch.Generator().manual_seed(experts)
    weight = torch.randn(experts, 96, generator=generator)
    for tokens in (1, 3, 4, 9):
        x = torch.randn(tokens, 96, generator=generator)
        assert torch.equal(ops.router_logits(x, weight), exact_routing.logits(x, weight))


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("experts, top_k", [(1, 1), (7, 7), (60, 4), (33, 8)])
def test_routes_are_the_restatements(experts, top_k, normalize, score):
    generator = torch.Generator().manual_seed(top_k)
    moe = MoEConfig(num_experts=experts, top_k=top_k, expert_size=32, score=score, normalize=normalize, route_scale=2.5)
    logits = 4 * torch.randn(40, experts, generator=generator)
    logits[1] = 0.0  # ties
    logits[2, experts // 2] = float("nan")
    logits[3] = float("nan")
    logits[4] = torch.tensor([float("inf"), float("-inf")]).repeat(experts)[:experts]
    logits[5] = -300.0  # scores that are nearly 0
    logits[6] = 3e38 * torch.randn(experts, generator=generator).sign()
    for bias in (torch.zeros(experts), torch.randn(experts, generator=generator)):
        for isa in HERE:
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("POCKETFORGE_ISA", isa)
                chosen, weights = ops.route(logits, bias, top_k, softmax=score == "softmax", normalize=normalize, scale=2.5)
            expected = exact_routing.route(logits, bias, moe)
            assert torch.equal(chosen, expected[0])
            assert torch.equal(weights, expected[1]) and bool(weights.isfinite().all())
    assert chosen.shape == (40, top_k) and bool((chosen.diff(dim=1) > 0).all())


def test_routes_agree_with_the_router_of_training():
    from modeling.moe import Router

    router = Router(MIXTURES["mobile"])
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        router.weight.copy_(torch.randn(router.weight.shape, generator=generator))
        router.bias += 0.1 * torch.randn(router.bias.shape, generator=generator)
        x = torch.randn(50, 64, generator=generator)
        experts, mix, logits, _ = router(x)
        found = ops.router_logits(x, router.weight)
        torch.testing.assert_close(found, logits, atol=1e-4, rtol=1e-5)
        chosen, weights = ops.route(found, router.bias, 4, scale=2.5)
    order = experts.argsort(-1)
    assert torch.equal(chosen, experts.gather(1, order))
    torch.testing.assert_close(weights, mix.gather(1, order))


def test_mixing_adds_in_order():
    generator = torch.Generator().manual_seed(3)
    rows, weights, first = (torch.randn(size, generator=generator) for size in ((5, 3, 64), (5, 3), (5, 64)))
    for start in (first, None):
        expected = torch.zeros(5, 64) if start is None else start
        for i in range(3):
            expected = fma(weights[:, i, None].expand(5, 64), rows[:, i], expected)
        assert torch.equal(ops.mix(start, rows, weights), expected)


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="do not match"):
        ops.router_logits(torch.zeros(2, 32), torch.zeros(3, 64))
    with pytest.raises(ValueError, match="refused"):
        ops.router_logits(torch.zeros(2, 24), torch.zeros(3, 24))
    for top_k in (0, 4, 65):
        with pytest.raises(ValueError, match="refused"):
            ops.route(torch.zeros(2, 3), torch.zeros(3), top_k)
    with pytest.raises(ValueError, match="a bias of shape"):
        ops.route(torch.zeros(2, 3), torch.zeros(2), 1)
    with pytest.raises(ValueError, match="do not match"):
        ops.mix(None, torch.zeros(2, 3, 32), torch.zeros(2, 2))
