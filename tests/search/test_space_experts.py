"""Experts as dimensions: sizes against enumeration, what is idle, keys of old and new, filters, models and back."""

from __future__ import annotations

import json
import random
import tomllib
from dataclasses import replace

import pytest
import tomli_w

from modeling.config import ModelConfig
from modeling.families import FAMILIES
from modeling.moe_config import MoEConfig
from search.space import NUMBERS, Candidate, Space
from tests.helpers.spaces import everything

FIXED = {"vocab_size": 512, "max_positions": 256, "window": 64}
DENSE = Candidate(num_layers=2, hidden_size=64, ffn_size=256, num_heads=2, num_kv_heads=1, head_dim=32,
                  attention=("full", "window"), granularity=2)  # fmt: skip
MIXTURE = replace(DENSE, experts=4, granularity=4, shared_experts=1)


def small(**changes: object) -> Space:
    described = {
        "num_layers": [2, 3], "hidden_size": [64, 96], "ffn_size": [128, 192, 256], "num_heads": [2, 4], "num_kv_heads": [1],
        "head_dim": [32], "experts": [1, 2, 4], "granularity": [2, 3, 4], "shared_experts": [0, 1, 2], "fixed": FIXED,
        "limits": {"context": 128},
    }  # fmt: skip
    return Space.from_dict({**described, **changes})


@pytest.mark.parametrize("changes", [
    {}, {"limits": {"context": 128, "memory_bytes": 250_000}}, {"experts": [2, 4]}, {"experts": [1]},
    {"granularity": [1, 2], "shared_experts": [0]}, {"fixed": {**FIXED, "moe": {"dense_layers": 1}}, "experts": [1, 8]},
])  # fmt: skip
def test_size_is_what_enumeration_finds(changes: dict[str, object]) -> None:
    space = small(**changes)
    every = everything(space)
    found = {space.key(candidate) for candidate in every if not space.violations(candidate)}
    assert space.size() == len(found)
    assert space.encodings() == len({space.key(candidate) for candidate in every}) > space.size()


def test_what_a_dense_model_does_not_use_makes_no_other_candidate() -> None:
    space = small()
    others = [replace(DENSE, granularity=g, shared_experts=s) for g in (1, 2, 3, 4, 7) for s in (0, 1, 2)]
    assert {space.key(other) for other in others} == {space.key(DENSE)}
    assert all(space.canonical(other) == DENSE and not space.violations(other) for other in others)
    flats = [space.repair({**space.flatten(DENSE), "granularity": g, "shared_experts": s}) for g in (2, 3) for s in (0, 2)]
    assert all(flat == flats[0] for flat in flats) and flats[0]["granularity"] == 2 and flats[0]["shared_experts"] == 0
    used = [replace(MIXTURE, granularity=g, shared_experts=s) for g in (2, 4) for s in (0, 1)]
    assert len({space.key(other) for other in used}) == 4


def test_keys_of_dense_models_are_those_of_spaces_without_experts() -> None:
    space, plain = small(), small(experts=[1], granularity=[1], shared_experts=[0])
    assert space.key(DENSE) == plain.key(DENSE) == "2-64-256-2-1-32-1-fw"
    assert space.key(MIXTURE) == "2-64-256-2-1-32-1-4-4-1-fw"
    for candidate in (DENSE, MIXTURE):
        assert space.from_key(space.key(candidate)) == candidate
    for wrong in ("2-64-256-2-1-32-1-4-fw", "2-64-256-2-1-32-fw", "2-64-256-2-1-32-1-x-4-1-fw", ""):
        with pytest.raises(ValueError, match="expected 7 numbers \\(10 of a mixture of experts\\)"):
            space.from_key(wrong)


def test_a_space_without_experts_shows_no_names_of_them() -> None:
    plain = Space.from_dict({name: list(values) for name, values in small().choices.items() if name not in NUMBERS[-3:]}
                            | {"fixed": FIXED})  # fmt: skip
    assert not plain.has_experts and small().has_experts
    for names in (plain.flat_choices(), plain.flatten(DENSE), plain.to_dict()):
        assert not set(names) & set(NUMBERS[-3:])
    assert list(small().flat_choices())[7:10] == list(NUMBERS[-3:])
    drawn = plain.sample(random.Random(0), 20)
    assert all(plain.unflatten(plain.flatten(candidate)) == candidate for candidate in drawn)


def test_candidate_to_config_and_back() -> None:
    space = small(fixed={**FIXED, "moe": {"score": "softmax", "route_scale": 2.5, "dense_layers": 1}})
    drawn = space.sample(random.Random(1), 60)
    assert {1, 2, 4} == {candidate.experts for candidate in drawn}
    for candidate in drawn:
        config = space.to_config(candidate)
        assert (config.moe is None) == (candidate.experts == 1)
        if config.moe is not None:
            assert config.moe.active_size == candidate.ffn_size, "as much is active as of the dense one"
            assert (config.moe.score, config.moe.route_scale, config.moe.dense_layers) == ("softmax", 2.5, 1)
            capacity = config.moe.num_experts * config.moe.expert_size + config.moe.shared_size
            assert capacity == candidate.experts * candidate.ffn_size
        assert space.from_config(config) == candidate
        assert space.unflatten(space.flatten(candidate)) == candidate


def test_mobilemoe_is_8_8_4() -> None:
    config = FAMILIES["mobilemoe_s"]
    assert config.moe is not None and config.moe.shared_size % config.moe.expert_size == 0
    sizes = {name: [getattr(config, name)] for name in ("num_layers", "hidden_size", "num_heads", "num_kv_heads", "head_dim")}
    rule = {name: getattr(config.moe, name) for name in ("score", "normalize", "route_scale", "dense_layers")}
    space = Space.from_dict({
        **sizes, "ffn_size": [8 * config.moe.expert_size], "experts": [1, 8], "granularity": [8], "shared_experts": [4],
        "attention": ["full"], "fixed": {"vocab_size": config.vocab_size, "moe": rule},
    })  # fmt: skip
    candidate = next(c for c in space.sample(random.Random(0), 50) if c.experts == 8)
    assert space.to_config(candidate).moe == config.moe
    assert config.moe.num_experts == 60 and config.moe.top_k == 4


def test_a_mixture_that_the_lists_do_not_hold_is_refused() -> None:
    space = small()
    config = space.to_config(MIXTURE)
    assert config.moe == MoEConfig(num_experts=15, top_k=3, expert_size=64, shared_size=64)
    for changes, words in [
        ({"num_experts": 31}, "experts=8 is not one of"), ({"top_k": 2}, "no experts, granularity and shared_experts give"),
        ({"shared_size": 32}, "give that"), ({"num_experts": 16}, "give that"), ({"expert_size": 512}, "give that"),
        ({"expert_size": 96}, "give that"), ({"route_scale": 2.5}, "model.moe.route_scale=2.5, but the space fixes it to 1.0"),
        ({"dense_layers": 1}, "model.moe.dense_layers=1, but the space fixes it to 0"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=words):
            space.from_config(replace(config, moe=replace(config.moe, **changes)))
    plain = small(experts=[1])
    with pytest.raises(ValueError, match="experts=4 is not one of"):
        plain.from_config(config)
    dense = ModelConfig(num_layers=2, hidden_size=64, ffn_size=256, num_heads=2, num_kv_heads=1, head_dim=32, **FIXED)
    assert space.from_config(dense).experts == 1


def test_filters_say_what_is_wrong_with_a_mixture() -> None:
    space = small()
    for changes, words in [
        ({"granularity": 3}, "ffn_size=256 is not a multiple of granularity=3"),
        ({"ffn_size": 192, "granularity": 4}, "ffn_size=192 of granularity=4 makes experts of 48, not a multiple of 32"),
        ({"granularity": 2, "shared_experts": 2}, "shared_experts=2 leaves no expert to choose at granularity=2"),
    ]:  # fmt: skip
        candidate = replace(MIXTURE, **changes)
        assert space.violations(candidate) == [text for text in space.violations(candidate) if words in text] != []
        assert not space.violations(replace(candidate, experts=1)), "idle numbers break no filter"
    with pytest.raises(ValueError, match="ffn_size=256 is not a multiple of granularity=3"):
        space.to_config(replace(MIXTURE, granularity=3))


def test_the_memory_cap_counts_every_expert() -> None:
    space = small()
    needed = {candidate.experts: space.limits.memory(space.to_config(candidate)) for candidate in (DENSE, MIXTURE)}
    assert needed[4] > 2 * needed[1]
    capped = small(limits={"context": 128, "memory_bytes": needed[4] - 1})
    assert not capped.violations(DENSE) and f"needs {needed[4]} bytes" in capped.violations(MIXTURE)[0]
    assert not any(capped.violations(candidate) for candidate in capped.sample(random.Random(3), 200))


def test_neighbours_are_feasible_both_ways_also_from_dense_to_mixture() -> None:
    space = small()
    for candidate in [DENSE, MIXTURE, *space.sample(random.Random(4), 5)]:
        around = space.neighbours(candidate)
        assert around and not any(space.violations(other) for other in around)
        keys = {space.key(other) for other in around}
        assert len(keys) == len(around) and space.key(candidate) not in keys
        assert all(space.canonical(other) == other for other in around)
        for other in around:
            assert space.key(candidate) in {space.key(back) for back in space.neighbours(other)}
    assert {(o.granularity, o.shared_experts) for o in space.neighbours(DENSE) if o.experts == 2} == {
        (2, 0), (2, 1), (4, 0), (4, 1), (4, 2)}  # fmt: skip


def test_plain_description_survives_toml_and_json() -> None:
    space = small(fixed={**FIXED, "moe": {"score": "softmax", "normalize": False, "route_scale": 2.5}})
    plain = space.to_dict()
    for copy in (tomllib.loads(tomli_w.dumps(plain)), json.loads(json.dumps(plain))):
        again = Space.from_dict(copy)
        assert again.to_dict() == plain and again.size() == space.size()


@pytest.mark.parametrize(("changes", "message"), [
    ({"experts": [0, 2]}, r"space.experts holds 0; expected whole numbers of at least 1"),
    ({"shared_experts": [-1]}, r"space.shared_experts holds -1; expected whole numbers of at least 0"),
    ({"granularity": [2.5]}, r"space.granularity holds 2.5"),
    ({"granularity": 4}, r"space.granularity=4 is not a list"),
    ({"experts": [4], "granularity": [5]}, r"no feasible point: .*ffn_size=128 is not a multiple of granularity=5"),
    ({"experts": [4], "granularity": [16]}, r"no feasible point: .*makes experts of 8, not a multiple of 32"),
    ({"experts": [4], "granularity": [2], "shared_experts": [2]}, r"no feasible point: .*leaves no expert to choose"),
    ({"fixed": {**FIXED, "moe": {"num_experts": 4}}}, r"space.fixed.moe.num_experts: no rule of a router"),
    ({"fixed": {**FIXED, "moe": {"score": "relu"}}}, r"space.fixed.moe.score='relu'; expected one of sigmoid, softmax"),
    ({"fixed": {**FIXED, "moe": {"route_scale": 0}}}, r"space.fixed.moe.route_scale=0; expected a number above 0"),
    ({"fixed": {**FIXED, "moe": {"normalize": 1}}}, r"space.fixed.moe.normalize=1; expected true or false"),
    ({"fixed": {**FIXED, "moe": {"dense_layers": 2}}}, r"space.fixed.moe.dense_layers=2; expected 0 to 1, below"),
    ({"fixed": {**FIXED, "moe": 8}}, r"space.fixed.moe=8; expected a table"),
])  # fmt: skip
def test_bad_descriptions_are_one_clear_line(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        small(**changes)
    assert "\n" not in str(caught.value)
