"""The quality of a candidate: prune the backbone, inherit its weights, train briefly, score on held-out text.

This is the training that `search.quality.TrainedScorer` is handed. It runs through `stages/` as every training does: in
this process, or on Ray with FSDP where the recipe asks for workers. It is plain data, so it travels to a Ray task.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import shutil
import time
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from data_pipeline.config import HeldOutConfig
from launch.config import Recipe
from launch.rundir import write_json
from modeling.config import ModelConfig
from modeling.identity import config_key
from search.quality import Quality
from stages.config import CheckpointConfig, StageName, TrainConfig
from stages.errors import InputError, NonFiniteError, RunError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class PrunedTraining:
    """Callable: (candidate, budget in tokens, seed) -> `Quality`.

    A score lies in `folder/KEY/quality.json`, KEY a hash of all that it depends on: asked again, also after the process
    died, it is read and not computed; a training that was cut short goes on from its last checkpoint.
    """

    recipe: Recipe
    """Data, optimizer and workers; its model is replaced by the candidate."""
    backbone: str
    """Run, stage or checkpoint whose weights are inherited; empty trains from random weights."""
    folder: str
    importance: str = ""
    """JSON of the backbone's calibration (`stages.importance_file`)."""
    stage: StageName = "pretrain"
    """Whose data and optimizer are used."""
    held_out: str = ""
    """Name of the held-out set that is scored; empty takes the recipe's first one of this stage's text."""
    metric: str = "loss"
    """`loss` (nats a token) or `bits_per_byte`."""
    variant: str = "wanda"
    layers: str = "cosine"
    share: str = "first"
    distill_weight: float = 0.0
    """Above 0 the backbone teaches: weight of the KL term."""
    keep: bool = False
    """Keep the trial's checkpoints; else only its score and its metrics stay."""

    def __post_init__(self) -> None:
        if self.stage not in self.recipe.stages():
            raise InputError(f"recipe {self.recipe.name} has no {self.stage} stage; it has {', '.join(self.recipe.stages())}")
        if self.metric not in ("loss", "bits_per_byte"):
            raise InputError(f"metric {self.metric!r}; expected loss or bits_per_byte")
        if self.backbone and not self.importance:
            raise InputError("a backbone is pruned by its importance; calibrate it and give the JSON")
        self._held_out_set()

    def __call__(self, candidate: ModelConfig, budget_tokens: int, seed: int) -> Quality:
        """Raises only for what concerns every candidate: a backbone, importance or data that cannot be read."""
        trial = Path(self.folder) / self.key(candidate, budget_tokens, seed)
        if (known := read_quality(trial / "quality.json")) is not None:
            return known
        started = time.perf_counter()
        quality = replace(self._score(candidate, budget_tokens, seed, trial), seconds=time.perf_counter() - started)
        if quality.status != "failed":
            write_json(trial / "quality.json", quality.to_dict())
            if not self.keep:
                for name in ("inherited", self.stage, "ray"):
                    shutil.rmtree(trial / name / "checkpoints" if name == self.stage else trial / name, ignore_errors=True)
        return quality

    def key(self, candidate: ModelConfig, budget_tokens: int, seed: int) -> str:
        """Hash of the candidate, the budget, the seed, the backbone's very weights and everything that trains."""
        stage = self.recipe.stages()[self.stage]
        parts: dict[str, Any] = {
            "candidate": config_key(candidate), "init_std": 0 if self.backbone else candidate.init_std,
            "tokens": budget_tokens, "seed": seed, "stage": asdict(stage), "parallel": self.recipe.parallel.precision,
            "held_out": asdict(self._held_out_set()), "metric": self.metric, "distill": self.distill_weight,
        }  # fmt: skip
        if self.backbone:
            from stages.checkpoint import resolve
            from stages.checkpoint_files import COMMIT, file_hash

            parts |= {"backbone": file_hash(resolve(self.backbone) / COMMIT), "importance": Path(self.importance).stem,
                      "pruning": [self.variant, self.layers, self.share]}  # fmt: skip
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]

    def _score(self, candidate: ModelConfig, budget_tokens: int, seed: int, trial: Path) -> Quality:
        from launch.runner import train_stages

        if problems := self._uncovered(candidate):
            return Quality(status="infeasible", metric=self.metric, reason=f"not covered by the backbone: {problems}")
        recipe, steps = self._trial_recipe(candidate, budget_tokens, seed)
        stage = recipe.stages()[self.stage]
        tokens = steps * stage.global_batch * stage.seq_len
        try:
            inherited = self._inherit(candidate, trial / "inherited") if self.backbone else None
            train_stages(recipe, trial, [self.stage], init_from=inherited, cache_dir=Path(self.folder) / "data", progress=False)
        except NonFiniteError as error:
            return Quality(status="infeasible", metric=self.metric, tokens=tokens, reason=" ".join(str(error).split()))
        except RunError as error:
            return Quality(status="failed", metric=self.metric, reason=" ".join(str(error).split()))
        scores = json.loads((trial / self.stage / "evaluation.json").read_text(encoding="utf-8"))
        before, after = (scores[when][self._held_out_set().name][self.metric] for when in ("before", "after"))
        if not math.isfinite(after):
            return Quality(status="infeasible", metric=self.metric, tokens=tokens,
                           reason=f"held-out {self.metric} is {after} after {steps} steps")  # fmt: skip
        return Quality(status="ok", loss=after, metric=self.metric, tokens=tokens,
                       start_loss=before if math.isfinite(before) else None)  # fmt: skip

    def _uncovered(self, candidate: ModelConfig) -> str:
        if not self.backbone:
            return ""
        from modeling.prune import uncovered
        from stages.checkpoint import resolve
        from stages.prune import inherit_positions
        from stages.state import read_model

        backbone, _ = read_model(resolve(self.backbone))
        return "; ".join(uncovered(backbone, inherit_positions(candidate, backbone)))

    def _inherit(self, candidate: ModelConfig, folder: Path) -> str:
        """The pruned checkpoint, made anew where an earlier try was cut short."""
        from stages.checkpoint import latest
        from stages.prune import PruneOptions, prune_checkpoint

        if latest(folder / "checkpoints") is None:
            options = PruneOptions(variant=self.variant, layers=self.layers, share=self.share)  # type: ignore[arg-type]
            prune_checkpoint(self.backbone, self.importance, candidate, folder, options)
        return str(folder)

    def _trial_recipe(self, candidate: ModelConfig, budget_tokens: int, seed: int) -> tuple[Recipe, int]:
        """One stage over the budget: the schedule ends where the budget does."""
        recipe = self.recipe
        stage = recipe.stages()[self.stage]
        steps = max(1, round(budget_tokens / (stage.global_batch * stage.seq_len)))
        if self.backbone:
            from stages.checkpoint import resolve
            from stages.prune import inherit_positions
            from stages.state import read_model

            checkpoint = resolve(self.backbone)
            candidate = inherit_positions(candidate, read_model(checkpoint)[0])
            if self.distill_weight:
                from stages.config import DistillConfig

                distill = DistillConfig(teacher=str(checkpoint), weight=self.distill_weight)
                stage = replace(stage, distill=distill)
        warmup = min(stage.optim.warmup_steps, steps // 10)
        stage = replace(stage, steps=steps, optim=replace(stage.optim, warmup_steps=warmup))
        train = TrainConfig(log_every=max(1, steps // 10), seed=seed, held_out=(self._held_out_set(),))
        changed: dict[str, Any] = {
            self.stage: stage, "model": candidate, "train": train, "tracking": replace(recipe.tracking, wandb="disabled"),
            "checkpoint": CheckpointConfig(every=recipe.checkpoint.every, keep=1),
        }  # fmt: skip
        return replace(recipe, **changed), steps

    def _held_out_set(self) -> HeldOutConfig:
        return held_out_set(self.recipe, self.stage, self.held_out)


def held_out_set(recipe: Recipe, stage: StageName, name: str = "") -> HeldOutConfig:
    """The set of that name, or the first, of the stage's own text. Raises InputError where there is none."""
    config = recipe.stages()[stage]
    sources = {source.name for source in config.data.sources}
    sets = [item for item in recipe.train.held_out if set(item.sources) <= sources and item.kind == config.data.kind]
    found = [item for item in sets if item.name == name] if name else sets
    if not found:
        raise InputError(f"recipe {recipe.name} has no held-out set {name!r} of the {stage} stage's "
                         f"sources; it has {', '.join(item.name for item in sets) or 'none'}")
    return found[0]


@dataclass(frozen=True, kw_only=True)
class SupernetQuality:
    """Callable like `PrunedTraining`, without training: held-out loss with the weights of a supernet (`stages/supernet.py`).

    The budget and the seed change nothing; `tokens` says what the supernet itself was trained on.
    """

    supernet: str
    """Folder that `stages.supernet.save_supernet` wrote."""
    texts: tuple[str, ...]
    """Held-out documents."""
    metric: str = "loss"

    def __call__(self, candidate: ModelConfig, budget_tokens: int, seed: int) -> Quality:
        from modeling.prune import uncovered
        from stages.evaluate import perplexity
        from stages.scoring import Scorer
        from stages.supernet import candidate_nll

        started = time.perf_counter()
        supernet, tokenizer, tokens = _load_supernet(self.supernet)
        if problems := uncovered(supernet.largest, candidate):
            reason = f"not covered by the supernet: {'; '.join(problems)}"
            return Quality(status="infeasible", metric=self.metric, reason=reason)
        scorer = Scorer(token_nll=candidate_nll(supernet, candidate), tokenizer=tokenizer, context=candidate.max_positions)
        loss = perplexity(scorer, self.texts)[self.metric]
        seconds = time.perf_counter() - started
        if not math.isfinite(loss):
            return Quality(status="infeasible", metric=self.metric, tokens=tokens, seconds=seconds, reason=f"loss is {loss}")
        return Quality(status="ok", loss=loss, metric=self.metric, tokens=tokens, seconds=seconds)


@lru_cache(maxsize=2)
def _load_supernet(folder: str) -> Any:
    from stages.supernet import load_supernet

    return load_supernet(folder)


def read_quality(path: Path) -> Quality | None:
    """What was scored before; None where nothing was, or where the record is damaged (it is then scored again)."""
    if not path.is_file():
        return None
    try:
        return Quality.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, RecursionError) as error:
        logger.warning("%s is damaged (%s); scoring again", path, error)
        return None
