"""Designs: the published sizes, caps that nothing breaks, what would do where nothing fits, and which E wins when."""

from __future__ import annotations

import random
import re
from dataclasses import replace

import pytest

from modeling.families import FAMILIES
from search.scaling_design import designs, rounded_up
from search.scaling_law import PUBLISHED, Choice, LawError
from search.scaling_shapes import Caps, Rules, build, costs_of, layers_of

CUT = Choice(8, True)


@pytest.mark.parametrize(
    "name, hidden, layers, active, total",
    [("s", 768, 20, 272e6, 1.263e9), ("m", 1024, 26, 528e6, 2.818e9), ("l", 1280, 32, 922e6, 5.326e9)],
)
def test_the_rules_give_the_published_sizes(name, hidden, layers, active, total):
    config = build(hidden, layers, 4, 8, CUT, Rules(), 8192)
    assert config.num_active_params() == pytest.approx(active, rel=0.01)
    assert config.num_params() == pytest.approx(total, rel=0.01)
    published = FAMILIES[f"mobilemoe_{name}"]
    assert config == replace(published, rope_scaling=None) and layers in layers_of(hidden)


def random_question(draw: random.Random) -> tuple[Caps, Rules]:
    def maybe(low: float, high: float) -> float | None:
        return 10 ** draw.uniform(low, high) if draw.random() < 0.7 else None

    train, tokens = maybe(17, 22), maybe(8, 12)
    caps = Caps(
        memory_bytes=maybe(7.5, 10.5), token_flops=maybe(7.8, 10), train_flops=train,
        tokens=10 ** draw.uniform(9, 11) if train is None else tokens if draw.random() < 0.3 else None,
        context=draw.choice([1, 512, 8192, 131_072]), attention=draw.random() < 0.3, weight_bits=draw.choice([4, 8]),
    )  # fmt: skip
    cuts = draw.choice([None, (Choice(8, True), Choice(8), Choice(4)), (Choice(16, True), Choice(1))])
    rules = Rules(vocab_size=draw.choice([512, 32_000, 128_256]), kv_heads=draw.choice([(4,), (1,), (3, 4, 5)]), choices=cuts)
    return caps, rules


def breaks(config, tokens: int, caps: Caps) -> list[str]:
    """Caps that a config breaks, from its own counts."""
    flops = config.flops_per_token(caps.context if caps.attention else 0)
    memory = config.weight_bytes(caps.weight_bits, 32) + config.kv_bytes(caps.context, 8)
    costs = {"memory_bytes": memory, "token_flops": max(2 * config.num_active_params(), flops),
             "train_flops": 6 * config.num_active_params() * tokens}  # fmt: skip
    return [name for name, cost in costs.items() if (cap := getattr(caps, name)) is not None and cost > cap]


@pytest.mark.parametrize("seed", range(40))
def test_no_design_breaks_a_cap_and_what_is_said_to_do_does(seed):
    draw = random.Random(seed)
    caps, rules = random_question(draw)
    try:
        found = designs(PUBLISHED, caps, rules)
    except LawError as error:
        match = re.search(r"smallest that would do is (\S+) (bytes|FLOPs a|training)", str(error))
        if match is None:
            assert "together; each alone" in str(error)
            return
        name = {"bytes": "memory_bytes", "FLOPs a": "token_flops", "training": "train_flops"}[match[2]]
        assert float(match[1]) > getattr(caps, name)
        found = designs(PUBLISHED, replace(caps, **{name: float(match[1])}), rules)
        caps = replace(caps, **{name: float(match[1])})
        less = replace(caps, **{name: float(match[1]) * 0.997})
        with pytest.raises(LawError):
            designs(PUBLISHED, less, rules)
    for design in found:
        assert not breaks(design.config, design.tokens, caps)
        assert all(share <= 1 for share in design.shares.values())
        assert design.costs == costs_of(design.config, design.tokens, caps)
        moe = design.config.moe
        assert (moe is None) == (design.experts == 1)
        if moe is not None:
            width = design.choice.granularity * moe.expert_size
            assert width == design.config.ffn_size == 4 * design.config.hidden_size and moe.expert_size % 32 == 0
            assert moe.top_k * moe.expert_size + moe.shared_size == width, "as much arithmetic as a dense one"
            assert moe.num_experts * moe.expert_size + moe.shared_size == design.experts * width
    losses = [design.prediction.loss for design in found]
    assert losses == sorted(losses) and len({design.experts for design in found}) == len(found)


@pytest.mark.parametrize("train, best", [(5e20, 8), (1.5e21, 4), (5e21, 2)])
def test_with_longer_training_the_published_law_turns_against_experts(train, best):
    """And its designs say that they lie outside of what was fitted."""
    found = designs(PUBLISHED, Caps(memory_bytes=5e9, train_flops=train))
    assert found[0].experts == best and found[0].prediction.warnings
    by = {design.experts: design.prediction.loss for design in found}
    if train == 5e21:
        assert by[2] == pytest.approx(2.208, abs=0.002) and by[8] == pytest.approx(2.238, abs=0.006)


def test_at_a_phones_cost_a_token_eight_times_the_experts_win():
    best = designs(PUBLISHED, Caps(memory_bytes=5e9, token_flops=1e9, train_flops=5e20))[0]
    assert best.experts == 8 and not best.prediction.warnings
    assert best.config.moe.num_experts == 60 and best.config.moe.top_k == 4


def test_only_inside_of_the_fitted_range_where_asked():
    caps = Caps(memory_bytes=5e9, train_flops=1.5e21)
    assert designs(PUBLISHED, caps)[0].prediction.warnings
    assert not any(design.prediction.warnings for design in designs(PUBLISHED, caps, Rules(inside=True)))
    with pytest.raises(LawError, match="no design within the caps is where the law was fitted .N 0.3B to 0.9B, D 100B to 500B"):
        designs(PUBLISHED, Caps(tokens=6e12), Rules(inside=True))


def test_a_law_of_dense_models_designs_dense_models():
    law = replace(PUBLISHED, common=replace(PUBLISHED.common, experts=(1, 1)))
    assert {design.experts for design in designs(law, Caps(tokens=1e11, memory_bytes=1e9))} == {1}


def test_the_best_of_several_cuts_is_taken():
    better = replace(PUBLISHED.common, constants=replace(PUBLISHED.common.constants, A=0.2))
    law = replace(PUBLISHED, parts={CUT: PUBLISHED.common, Choice(4): better})
    found = designs(law, Caps(token_flops=1e9, train_flops=5e20))
    assert {design.choice for design in found} == {None, Choice(4)}


@pytest.mark.parametrize(
    "make, words",
    [(lambda: Caps(memory_bytes=1e9), "neither training FLOPs nor tokens"), (lambda: Caps(tokens=-1), "tokens is -1"),
     (lambda: Caps(tokens=float("nan")), "finite"), (lambda: Rules(kv_heads=()), "kv_heads"),
     (lambda: Rules(experts=(0,)), "experts"), (lambda: Choice(1, True), "at least 2"),
     (lambda: designs(PUBLISHED, Caps(tokens=1e9), Rules(kv_heads=(999,))), "no model can be built")],
)  # fmt: skip
def test_bad_questions_are_refused(make, words):
    with pytest.raises(LawError, match=words):
        make()


def test_rounding_never_falls_below():
    draw = random.Random(0)
    for _ in range(2000):
        value = 10 ** draw.uniform(-3, 22)
        assert value <= float(rounded_up(value)) <= value * 1.0011
