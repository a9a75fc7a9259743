"""Held-out scores of a stage: before it, every so many steps, after it, in `evaluation.json`."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from data_pipeline.config import HeldOutConfig, SourceConfig
from data_pipeline.held_out import held_out_chats, held_out_texts
from data_pipeline.tokenizer import Tokenizer
from modeling.config import ModelConfig
from stages.distributed import Process, on_first
from stages.evaluate import chat_loss, perplexity
from stages.job import StageJob
from stages.objectives import TrainableModel
from stages.parallel.fsdp import reshard
from stages.scoring import Scorer

logger = logging.getLogger(__name__)

Table = dict[str, dict[str, float]]


class HeldOutScores:
    """Scores the sets of `job.held_out` and keeps them in the stage's `evaluation.json`.

    The file is {"before": table, "after": table, "steps": {step: table}}, table = {held-out set: {metric: value}}. A
    stage that trains with fake quantization is scored with it: its "before" is plain round-to-nearest.
    """

    def __init__(self, job: StageJob, process: Process) -> None:
        self.job = job
        self.process = process
        self.path = job.folder / "evaluation.json"
        self.scores: dict[str, Any] = on_first(self._read, process)

    @property
    def complete(self) -> bool:
        return not self.job.held_out or "after" in self.scores

    def forget_after(self) -> None:
        """The stage trains on: an "after" of an earlier, shorter run of it no longer holds."""
        self.scores.pop("after", None)

    def score(
        self, module: TrainableModel, tokenizer: Tokenizer, model: ModelConfig,
        compute: Callable[[], AbstractContextManager[Any]], when: str | int,
    ) -> None:  # fmt: skip
        """Score now, under the name `when` ("before", "after" or a step), unless that is in the file already."""
        known = self.scores.get("steps", {}) if isinstance(when, int) else self.scores
        if not self.job.held_out or str(when) in known:
            return
        device = self.process.device

        @torch.no_grad()
        def token_nll(tokens: Tensor, positions: Tensor | None, labels: Tensor) -> Tensor:
            tokens, labels = tokens.to(device), labels.to(device)
            positions = None if positions is None else positions.to(device)
            with compute():
                return module(tokens, positions, labels, reduction="none")

        scorer = Scorer(token_nll=token_nll, tokenizer=tokenizer, context=model.max_positions,
                        rank=self.process.rank, world=self.process.world)  # fmt: skip
        table = {item.name: self._score_set(scorer, item, sources) for item, sources in self.job.held_out}
        reshard(module)
        if isinstance(when, int):
            self.scores.setdefault("steps", {})[str(when)] = table
        else:
            self.scores[when] = table
        if self.process.is_first:
            logger.info("%s held-out %s: %s", self.job.stage, when, json.dumps(table))
            self._write()

    def _score_set(
        self, scorer: Scorer, item: HeldOutConfig, sources: tuple[SourceConfig, ...]
    ) -> dict[str, float]:
        fraction = self.job.held_out_fraction
        if item.kind == "chat":
            return chat_loss(scorer, held_out_chats(sources, item.max_documents, fraction))
        texts = held_out_texts(sources, item.max_documents, fraction)
        return perplexity(scorer, [_head(text, item.max_document_bytes) for text in texts])

    def _read(self) -> dict[str, Any]:
        """The scores so far. A damaged file is moved aside, so that what can still be scored is scored again."""
        if not self.path.exists():
            return {}
        try:
            scores = json.loads(self.path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError):
            scores = None
        if _is_scores(scores):
            return scores
        aside = self.path.with_name("evaluation.json.damaged")
        self.path.replace(aside)
        logger.warning("%s is damaged; moved to %s, and scored again as far as the stage still can be", self.path, aside.name)
        return {}

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_name(".evaluation.json.part")
        beside.write_text(json.dumps(self.scores, indent=2) + "\n", encoding="utf-8")
        beside.replace(self.path)


def _is_scores(value: Any) -> bool:
    """Whether this is the object that `HeldOutScores` writes."""
    if not isinstance(value, dict):
        return False
    steps = value.get("steps", {})
    tables = [table for when, table in value.items() if when != "steps"]
    return isinstance(steps, dict) and all(_is_table(table) for table in (*tables, *steps.values()))


def _is_table(value: Any) -> bool:
    rows = value.values() if isinstance(value, dict) else [None]
    return all(isinstance(row, dict) and all(isinstance(number, int | float) for number in row.values()) for row in rows)


def _head(text: str, max_bytes: int | None) -> str:
    """The start of a text, whole characters."""
    return text if max_bytes is None else text.encode()[:max_bytes].decode(errors="ignore")
