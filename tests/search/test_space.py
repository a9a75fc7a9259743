"""The space: filters, keys, size against enumeration, sampling, neighbours, plain description."""

from __future__ import annotations

import json
import random
import tomllib
from collections import Counter
from dataclasses import replace

import pytest
import tomli_w

from modeling.config import ModelConfig
from search.space import KINDS, NUMBERS, Candidate, Limits, Space
from tests.helpers.spaces import everything

FIXED = {"vocab_size": 512, "max_positions": 256, "window": 64}


def small(**changes: object) -> Space:
    described = {
        "num_layers": [2, 3, 5], "hidden_size": [64, 96], "ffn_size": [128, 256], "num_heads": [2, 3, 4],
        "num_kv_heads": [1, 2], "head_dim": [32], "block_repeat": [1, 2], "fixed": FIXED, "limits": {"context": 128},
    }  # fmt: skip
    return Space.from_dict({**described, **changes})


@pytest.mark.parametrize("changes", [
    {}, {"limits": {"context": 128, "memory_bytes": 150_000}}, {"limits": {"max_without_full": 1}},
    {"attention": ["full", "skip"]}, {"limits": {"context": 128, "max_without_full": 4, "memory_bytes": 90_000}},
])  # fmt: skip
def test_size_is_what_enumeration_finds(changes: dict[str, object]) -> None:
    space = small(**changes)
    found = [candidate for candidate in everything(space) if not space.violations(candidate)]
    assert space.size() == len(found) == len({space.key(candidate) for candidate in found})
    assert space.encodings() == len(everything(space)) > space.size()


def test_flash_space_is_counted_in_a_moment() -> None:
    space = Space.from_dict({
        "num_layers": list(range(10, 17)), "hidden_size": list(range(1024, 2049, 128)),
        "ffn_size": list(range(2048, 8193, 512)), "num_heads": [8, 12, 16, 20, 24, 28, 32], "num_kv_heads": [2, 4, 8],
        "fixed": {"vocab_size": 128256}, "limits": {"memory_bytes": 700_000_000},
    })  # fmt: skip
    assert 10**9 < space.size() < space.encodings() == 9 * 13 * 7 * 3 * sum(3**layers for layers in range(10, 17))


def test_three_layers_without_full_attention_are_refused_and_two_are_not() -> None:
    space = small()
    base = Candidate(num_layers=5, hidden_size=64, ffn_size=128, num_heads=2, num_kv_heads=1, head_dim=32,
                     attention=("full", "skip", "window", "full", "skip"))  # fmt: skip
    assert space.violations(base) == []
    assert "3 layers in a row" in space.violations(replace(base, attention=("full", "skip", "window", "skip", "full")))[0]
    assert "4 layers in a row" in space.violations(replace(base, block_repeat=2))[0]
    assert "no layer has full attention" in space.violations(replace(base, attention=("skip",) * 5))


def test_other_filters_say_what_is_wrong() -> None:
    base = Candidate(num_layers=2, hidden_size=64, ffn_size=128, num_heads=3, num_kv_heads=2, head_dim=32,
                     attention=("full", "full"))  # fmt: skip
    assert "num_heads=3 is not a multiple of num_kv_heads=2" in small().violations(base)
    odd = small(hidden_size=[64, 72], head_dim=[31, 32])
    wrong = odd.violations(replace(base, hidden_size=72, head_dim=31, num_heads=2))
    assert any("hidden_size=72 is not a multiple of 32" in text for text in wrong)
    assert any("head_dim=31 is odd" in text for text in wrong)
    capped = small(limits={"memory_bytes": 90_000, "context": 128})
    assert "the cap is 90000" in capped.violations(replace(base, num_heads=4, ffn_size=256))[0]


def test_candidate_to_config_and_back() -> None:
    space = small(attention=["skip", "full", "window"])
    for candidate in space.sample(random.Random(1), 50):
        config = space.to_config(candidate)
        assert isinstance(config, ModelConfig) and config.window == 64
        assert space.from_config(config) == candidate
        assert space.unflatten(space.flatten(candidate)) == candidate
    full = ModelConfig(num_layers=2, hidden_size=64, ffn_size=128, num_heads=2, num_kv_heads=1, head_dim=32, **FIXED)
    assert space.from_config(full).attention == ("full", "full")
    with pytest.raises(ValueError, match=r"ffn_size=160 is not one of"):
        space.from_config(replace(full, ffn_size=160))
    with pytest.raises(ValueError, match=r"model.window=32, but the space fixes it to 64"):
        space.from_config(replace(full, window=32))


def test_idle_slots_do_not_make_another_candidate() -> None:
    space = small()
    flat = space.flatten(space.sample(random.Random(0), 1)[0]) | {"num_layers": 2}
    other = flat | {"attention.2": "skip", "attention.4": "window"}
    assert space.key(space.unflatten(flat)) == space.key(space.unflatten(other))
    assert space.repair(flat) == space.repair(other) and set(flat) == set(space.flat_choices())
    used = flat | {"attention.1": next(kind for kind in KINDS if kind != flat["attention.1"])}
    assert space.key(space.unflatten(flat)) != space.key(space.unflatten(used))


def test_samples_are_feasible_and_patterns_uniform() -> None:
    space = small(num_layers=[4], hidden_size=[64], ffn_size=[128], num_heads=[2], num_kv_heads=[1], block_repeat=[1])
    drawn = space.sample(random.Random(0), 6000)
    assert not any(space.violations(candidate) for candidate in drawn)
    seen = Counter(candidate.attention for candidate in drawn)
    assert len(seen) == space.size()
    expected = len(drawn) / space.size()
    assert all(0.5 * expected < count < 1.6 * expected for count in seen.values())


def test_samples_keep_to_a_tight_memory_cap() -> None:
    space = small(limits={"memory_bytes": 80_000, "context": 128})
    assert all(space.violations(candidate) == [] for candidate in space.sample(random.Random(3), 300))


def test_neighbours_are_feasible_single_changes_both_ways() -> None:
    space = small(num_layers=[2, 3, 4])
    for candidate in space.sample(random.Random(4), 5):
        around = space.neighbours(candidate)
        assert around and all(not space.violations(other) for other in around)
        assert space.key(candidate) not in {space.key(other) for other in around}
        for other in around:
            changed = [name for name in NUMBERS if getattr(candidate, name) != getattr(other, name)]
            assert len(changed) <= 1
            assert space.key(candidate) in {space.key(back) for back in space.neighbours(other)}


def test_plain_description_survives_toml_and_json() -> None:
    space = small(limits={"memory_bytes": 150_000, "context": 128})
    plain = space.to_dict()
    for copy in (tomllib.loads(tomli_w.dumps(plain)), json.loads(json.dumps(plain))):
        again = Space.from_dict(copy)
        assert again.to_dict() == plain and again.size() == space.size()
    assert small(limits={}).limits == Limits()


@pytest.mark.parametrize(("changes", "message"), [
    ({"hidden_size": []}, r"space.hidden_size is empty"),
    ({"attention": []}, r"space.attention is empty"),
    ({"attention": ["full", "linear"]}, r"holds 'linear'; expected some of full, window, skip"),
    ({"hidden_size": 64}, r"space.hidden_size=64 is not a list"),
    ({"hidden_size": [96, 64]}, r"must ascend"),
    ({"hidden_size": [64, "96"]}, r"holds '96'; expected whole numbers"),
    ({"colours": [4]}, r"space.colours: no such dimension"),
    ({"fixed": {"vocab_size": 8, "colour": 1}}, r"space.fixed.colour: no such field"),
    ({"fixed": {}}, r"lacks vocab_size"),
    ({"limits": {"memory": 3}}, r"space.limits.memory: no such limit"),
    ({"limits": {"memory_bytes": 0}}, r"memory_bytes=0 must be at least 1"),
    ({"limits": {"memory_bytes": 20_000}}, r"no feasible point: the smallest candidate needs \d+ bytes, the cap is 20000"),
    ({"attention": ["skip"]}, r"no feasible point: .*add \"full\""),
    ({"num_heads": [3], "num_kv_heads": [2]}, r"no feasible point: .*not a multiple of num_kv_heads=2"),
])  # fmt: skip
def test_bad_descriptions_are_one_clear_line(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        small(**changes)
    assert "\n" not in str(caught.value)
