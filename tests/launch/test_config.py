"""Recipes, their TOML form, overrides, and what a wrong one says."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.config import from_dict, known_keys, load_recipe, save_toml, to_dict
from launch.overrides import apply_overrides
from launch.recipes import RECIPES
from stages.errors import InputError


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_a_recipe_is_valid_and_survives_its_toml_form(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name, {})
    save_toml(recipe, tmp_path / "recipe.toml")
    again = load_recipe(str(tmp_path / "recipe.toml"), {})
    assert again == recipe
    assert again.hash() == recipe.hash()


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_every_recipe_has_the_contract_overrides(name: str) -> None:
    overrides = {"train.steps": "20", "train.log-every": "1", "train.seed": "7", "checkpoint.every": "5",
                 "launch.workers": "1", "launch.nodes": "0"}
    recipe = load_recipe(name, overrides)
    assert (recipe.train.steps, recipe.train.log_every, recipe.train.seed) == (20, 1, 7)
    assert (recipe.checkpoint.every, recipe.launch.workers) == (5, 1)


def test_dashes_and_underscores_are_the_same() -> None:
    assert load_recipe("smoke", {"train.log-every": "3"}) == load_recipe("smoke", {"train.log_every": "3"})


def test_none_unsets_an_optional_key() -> None:
    assert load_recipe("smoke", {"train.steps": "5"}).train.steps == 5
    assert load_recipe("smoke", {"qat.distill": "none"}).qat.distill is None  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"train.stepz": "20"}, ["train.stepz", "did you mean", "train.steps"]),
        ({"train.steps": "many"}, ["train.steps", "many", "integer"]),
        ({"model.num_kv_heads": "3"}, ["num_heads=2", "num_kv_heads=3", "divisor"]),
        ({"pretrain.optim.schedule": "round"}, ["schedule", "round", "cosine"]),
        ({"launch.workers": "3"}, ["global_batch=8", "launch.workers=3"]),
        ({"launch.workers": "0"}, ["launch.workers=0"]),
        ({"train.steps.more": "1"}, ["train.steps"]),
    ],
)
def test_a_wrong_override_is_told_in_one_line(overrides: dict[str, str], words: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        load_recipe("quickstart", overrides)
    text = str(caught.value)
    assert "\n" not in text
    for word in words:
        assert word in text


def test_a_file_with_an_unknown_key_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    save_toml(load_recipe("smoke", {}), path)
    path.write_text(path.read_text().replace("log_every", "log_evry"))
    with pytest.raises(InputError, match="mine.toml.*log_evry.*log_every"):
        load_recipe(str(path), {})


def test_a_file_that_is_not_toml_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("name = [")
    with pytest.raises(InputError, match="not TOML"):
        load_recipe(str(path), {})


def test_an_unknown_recipe_suggests_the_nearest() -> None:
    with pytest.raises(InputError, match="quickstrat.*quickstart"):
        load_recipe("quickstrat", {})


def test_a_missing_part_is_named() -> None:
    values = to_dict(load_recipe("smoke", {}))
    del values["model"]["hidden_size"]
    with pytest.raises(InputError, match="model.hidden_size is missing"):
        from_dict(values, "here")


def test_overrides_leave_the_original_alone() -> None:
    values = to_dict(load_recipe("smoke", {}))
    before = to_dict(load_recipe("smoke", {}))
    apply_overrides(values, {"train.steps": "3"})
    assert values == before


def test_known_keys_name_every_level() -> None:
    assert {"name", "train.steps", "model.num_heads", "pretrain.optim.lr", "qat.quant.group_size"} <= set(known_keys())


@pytest.mark.parametrize(
    ("changes", "shared"),
    [
        ({"pretrain.data.held_out_fraction": "0.2"}, "library"),
        ({"pretrain.data.held_out_fraction": "0.2", "pretrain.data.sources.0.name": "other", "train.held_out": "[]"}, "other"),
        ({"qat.data.held_out_fraction": "0.2"}, "questions"),
    ],
)
def test_stages_over_one_source_hold_out_alike(
    changes: dict[str, str], shared: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("POCKETFORGE_DATA", raising=False)
    with pytest.raises(InputError, match=f"held_out_fraction=0.2.*{shared!r}"):
        load_recipe("smoke", changes)


def test_a_stage_with_sources_of_its_own_may_hold_out_another_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("POCKETFORGE_DATA", raising=False)
    recipe = load_recipe("smoke", {"sft.data.held_out_fraction": "0.2", "qat.data.held_out_fraction": "0.2"})
    assert recipe.held_out_fraction() == 0.1, "what is scored is held out everywhere"
