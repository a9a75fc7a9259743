"""A ladder of tiny models, dense and with experts, trained on real text: the runs that a scaling law is fitted to.

Every rung is an ordinary recipe run in a directory of its own, in this process. A finished rung is kept, one that was cut
short goes on from its last checkpoint, so a ladder may be stopped at any time and made longer later.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from launch.config import LaunchConfig, Recipe
from launch.rundir import open_run, read_json_object, write_json
from launch.search_quality import held_out_set
from search.scaling_files import Run, runs_text
from search.scaling_law import Choice, LawError
from search.scaling_shapes import Rules, build
from stages.config import CheckpointConfig, TrainConfig
from stages.errors import InputError, NonFiniteError

RUNS = "runs.jsonl"


@dataclass(frozen=True)
class Rung:
    """One training."""

    hidden: int
    experts: int
    choice: Choice | None
    """None for a dense model."""
    tokens: int
    """As asked; the run trains on whole batches."""

    @property
    def name(self) -> str:
        experts = f"-e{self.experts}-{self.choice}".replace("+", "-") if self.choice else ""
        return f"d{self.hidden}{experts}-t{self.tokens}"


@dataclass(frozen=True, kw_only=True)
class Ladder:
    """Which models, how long, and how each is trained."""

    recipe: Recipe
    """Text, tokenizer, batch and optimizer of its pretrain stage. Its model gives the vocabulary and the width that its
    learning rate suits: other widths get that times the root of the ratio."""
    hidden: tuple[int, ...] = (64, 128, 192)
    experts: tuple[int, ...] = (1, 2, 4, 8)
    choices: tuple[Choice, ...] = (Choice(8, True),)
    tokens: tuple[int, ...] = (250_000, 500_000, 1_000_000)
    kv_heads: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.recipe.pretrain is None:
            raise InputError(f"recipe {self.recipe.name} has no pretrain stage, which the ladder trains")
        for name in ("hidden", "experts", "tokens"):
            values = getattr(self, name)
            if not values or min(values) < 1 or len(set(values)) < len(values):
                raise InputError(f"--{name} {','.join(map(str, values))}; expected whole numbers above 0, each once")
        if max(self.experts) > 1 and not self.choices:
            raise InputError("no way to cut experts is named; give --granularity")
        for rung in self.rungs():
            self.recipe_of(rung)

    def rungs(self) -> list[Rung]:
        """The cheapest first."""
        return sorted(self._rungs(), key=lambda rung: (rung.tokens * rung.hidden**3 * (1 + rung.experts / 4), rung.name))

    def _rungs(self) -> Iterator[Rung]:
        for hidden in self.hidden:
            for tokens in self.tokens:
                for experts in self.experts:
                    for choice in self.choices if experts > 1 else (None,):
                        yield Rung(hidden, experts, choice, tokens)

    def recipe_of(self, rung: Rung) -> Recipe:
        """The run of a rung: one stage, its schedule over its tokens, scored on one held-out set. Raises InputError."""
        stage, model = self.recipe.pretrain, self.recipe.model
        assert stage is not None
        rules = Rules(vocab_size=model.vocab_size, rope_theta=model.rope_theta)
        layers = -(-rung.hidden // 40)
        try:
            config = build(rung.hidden, layers, self.kv_heads, rung.experts, rung.choice or Choice(), rules,
                           model.max_positions)  # fmt: skip
        except LawError as error:
            raise InputError(f"rung {rung.name}: {error}; choose other widths, granularities or KV heads") from None
        steps = max(1, round(rung.tokens / (stage.global_batch * stage.seq_len)))
        optim = replace(stage.optim, warmup_steps=min(stage.optim.warmup_steps, steps // 10),
                        lr=stage.optim.lr * (model.hidden_size / rung.hidden) ** 0.5)  # fmt: skip
        held_out = held_out_set(self.recipe, "pretrain")
        return replace(
            self.recipe, name=f"ladder-{rung.name}", model=replace(config, init_std=model.init_std),
            pretrain=replace(stage, steps=steps, optim=optim), midtrain=None, sft=None, qat=None,
            train=TrainConfig(log_every=max(1, steps // 10), seed=self.seed, held_out=(held_out,)),
            checkpoint=CheckpointConfig(every=0, keep=1),
            launch=LaunchConfig(runner="local", threads_per_worker=self.recipe.launch.threads_per_worker),
            tracking=replace(self.recipe.tracking, wandb="disabled"),
        )  # fmt: skip


def climb(ladder: Ladder, directory: Path, say: Callable[[str], None]) -> list[Run]:
    """Train what is not trained yet; all runs of the ladder, also in `directory/runs.jsonl`. One that diverges is left out."""
    rungs = ladder.rungs()
    done: list[Run] = []
    for place, rung in enumerate(rungs, 1):
        try:
            run, new = _run(ladder, rung, directory)
        except NonFiniteError as error:
            say(f"{place}/{len(rungs)} {rung.name}: left out, {error}")
            continue
        done.append(run)
        (directory / RUNS).write_text(runs_text(done), encoding="utf-8")
        say(f"{place}/{len(rungs)} {rung.name}: held-out loss {run.loss:.4f}{'' if new else ' (from before)'}")
    return done


def _run(ladder: Ladder, rung: Rung, directory: Path) -> tuple[Run, bool]:
    from launch.runner import train_stages

    folder, recipe = directory / "rungs" / rung.name, ladder.recipe_of(rung)
    with open_run(recipe, folder, resume=True):  # refuses a rung of another recipe
        if (known := _known(folder / "run.json")) is not None:
            return known, False
        train_stages(recipe, folder, ["pretrain"], init_from=None, cache_dir=directory / "data", progress=False)
        run = _record(rung, recipe, read_json_object(folder / "pretrain" / "evaluation.json"))
        write_json(folder / "run.json", asdict(run))
        shutil.rmtree(folder / "pretrain" / "checkpoints", ignore_errors=True)
    return run, True


def _known(path: Path) -> Run | None:
    values = read_json_object(path)
    try:
        return Run(**values) if values else None
    except (TypeError, LawError):
        return None


def _record(rung: Rung, recipe: Recipe, scores: dict[str, Any]) -> Run:
    stage, model = recipe.pretrain, recipe.model
    assert stage is not None
    after = scores["after"][recipe.train.held_out[0].name]
    choice = rung.choice or Choice()
    return Run(
        name=rung.name, active=model.num_active_params(), total=model.num_params(),
        active_without_embedding=model.num_active_params() - model.vocab_size * model.hidden_size,
        tokens=stage.steps * stage.global_batch * stage.seq_len, experts=rung.experts, granularity=choice.granularity,
        shared=choice.shared, loss=after["loss"], bits_per_byte=after["bits_per_byte"], vocab_size=model.vocab_size,
    )  # fmt: skip
