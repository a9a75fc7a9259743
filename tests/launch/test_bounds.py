"""Every number of a recipe has bounds, and a number out of them is one line that names its key."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator
from typing import Annotated, Any

import annotated_types
import pytest

from launch.config import Recipe, load_recipe
from stages.errors import InputError


def parts(hint: Any) -> Iterator[Any]:
    """A hint and all that it is made of, `Annotated` kept whole."""
    yield hint
    if typing.get_origin(hint) is not Annotated:
        for inner in typing.get_args(hint):
            yield from parts(inner)
    elif dataclasses.is_dataclass(inner := typing.get_args(hint)[0]) or typing.get_origin(inner) is tuple:
        yield from parts(inner)


def numbers(kind: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, hint) of every whole number and fraction below `kind`."""
    for name, hint in typing.get_type_hints(kind, include_extras=True).items():
        for part in parts(hint):
            if dataclasses.is_dataclass(part) and isinstance(part, type):
                yield from numbers(part, f"{prefix}{name}.")
            base = typing.get_args(part)[0] if typing.get_origin(part) is Annotated else part
            if base in (int, float):
                yield f"{prefix}{name}", part


def test_every_number_of_a_recipe_has_a_lower_bound() -> None:
    found = dict(numbers(Recipe))
    assert {"train.seed", "pretrain.optim.lr", "sft.data.sources.weight", "checkpoint.keep"} <= set(found)
    lower = (annotated_types.Ge, annotated_types.Gt)
    # QuantSpec checks its one number itself.
    unbounded = [key for key, hint in found.items() if not key.endswith("quant.group_size")
                 and not any(isinstance(item, lower) for item in getattr(hint, "__metadata__", ()))]
    assert not unbounded


COUNTS = ["train.steps", "train.log_every", "pretrain.steps", "pretrain.seq_len", "pretrain.global_batch", "checkpoint.keep",
          "launch.workers", "evaluation.limit", "evaluation.max_new_tokens", "model.hidden_size", "tokenizer.vocab_size",
          "tokenizer.train_bytes", "train.held_out.0.max_documents", "pretrain.data.sources.0.max_bytes"]  # fmt: skip
NATURALS = ["train.seed", "train.eval_every", "checkpoint.every", "pretrain.micro_batch", "pretrain.optim.warmup_steps",
            "launch.cpus_per_worker", "launch.gpus_per_worker", "launch.threads_per_worker", "launch.max_failures"]  # fmt: skip
FRACTIONS = ["pretrain.optim.lr", "pretrain.optim.eps", "pretrain.optim.weight_decay", "pretrain.optim.clip_norm",
             "pretrain.optim.beta1", "pretrain.optim.min_lr_ratio", "model.init_std", "model.rope_theta", "model.norm_eps",
             "pretrain.data.held_out_fraction", "pretrain.data.sources.0.weight", "parallel.timeout_seconds",
             "qat.distill.temperature", "qat.distill.weight"]  # fmt: skip


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *((key, value) for key in COUNTS for value in ("0", "-3", "99999999999999999999999")),
        *((key, value) for key in NATURALS for value in ("-1", "99999999999999999999999")),
        *((key, value) for key in FRACTIONS for value in ("nan", "-1", "inf")),
        ("pretrain.optim.beta1", "1.5"),
        ("pretrain.data.held_out_fraction", "1.0"),
        ("pretrain.data.sources.0.weight", "0"),
        ("pretrain.data.sources.0.name", '""'),
        ("pretrain.data.sources", "[]"),
        ("train.steps", "9" * 5000),
        ("tracking.project", "\udcff"),
    ],
)
def test_a_number_out_of_its_bounds_is_one_line_that_names_the_key(key: str, value: str) -> None:
    with pytest.raises(InputError) as caught:
        load_recipe("smoke", {key: value})
    text = str(caught.value)
    assert f"{key}=" in text and "\n" not in text and len(text) < 300


def test_the_largest_seed_is_a_seed() -> None:
    assert load_recipe("smoke", {"train.seed": str(2**63 - 1)}).train.seed == 2**63 - 1
