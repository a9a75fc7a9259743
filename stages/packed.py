"""A packed model in the runtime, for evaluation and generation: the same `Scorer` as a checkpoint, the same tokenizer."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data_pipeline.tokenizer import Tokenizer
from kernels.runtime import KvType, PackedModel, Sampler, Session
from stages.errors import InputError, RunError
from stages.objectives import IGNORE
from stages.scoring import Scorer


@dataclass(frozen=True, kw_only=True)
class LoadedPacked(Scorer):
    """A mapped file with what belongs to it; `stages.evaluate` scores it as it does a checkpoint."""

    model: PackedModel
    path: Path
    kv: KvType
    threads: int

    def session(self, context: int) -> Session:
        return self.model.session(context, threads=self.threads, kv=self.kv)


def load_packed(path: str | Path, *, kv: KvType = "f32", threads: int = 1) -> LoadedPacked:
    """Map a packed file that brings its tokenizer.

    Args:
        kv: how keys and values are kept; f32 is what training computed with, f16 and INT8 are what a phone has room for.

    Raises:
        PackedModelError: the file is damaged. InputError: it has no tokenizer. DataError: its tokenizer is damaged.
    """
    model = PackedModel(path)
    name = model.metadata().get("tokenizer")
    if not isinstance(name, str):
        raise InputError(f"model {path}: packed without a tokenizer; export it from a checkpoint that has one")
    try:
        text = model.tensor(name).decode()
    except (KeyError, UnicodeDecodeError):
        raise InputError(f"model {path}: its tokenizer {name!r} is missing or no text; export the model again") from None
    return LoadedPacked(
        token_nll=_RowByRow(model, kv, threads), tokenizer=Tokenizer.from_json(text), context=model.info.max_positions,
        model=model, path=Path(path), kv=kv, threads=threads,
    )  # fmt: skip


class _RowByRow:
    """`token_nll` of a runtime that holds one sequence: rows go one after the other, each without its padding."""

    def __init__(self, model: PackedModel, kv: KvType, threads: int) -> None:
        self.model, self.kv, self.threads = model, kv, threads
        self._session: Session | None = None
        self._context = 0

    def __call__(self, tokens: Tensor, positions: Tensor | None, labels: Tensor) -> Tensor:
        if positions is not None:
            raise ValueError("the runtime reads one document a row; got packed positions")
        result = torch.zeros(tokens.shape, dtype=torch.float32)
        for row, (ids, targets) in enumerate(zip(tokens, labels, strict=True)):
            counted = (targets != IGNORE).nonzero()
            if len(counted) == 0:
                continue
            end = int(counted[-1]) + 1
            result[row, :end] = torch.from_numpy(self._fresh(end).nll(ids[:end].tolist(), targets[:end].tolist()))
        return result

    def _fresh(self, length: int) -> Session:
        """An empty session that holds `length` tokens; made anew only where the last one is too small."""
        if self._session is None or length > self._context:
            self._context = min(max(length, 2 * self._context), self.model.info.max_positions)
            self._session = self.model.session(self._context, threads=self.threads, kv=self.kv)
        self._session.reset()
        return self._session


def generate_packed(
    loaded: LoadedPacked, prompt_ids: Sequence[int], max_new_tokens: int, *, temperature: float = 0.0, top_p: float = 1.0,
    seed: int = 0, stop_ids: Collection[int] = (),
) -> Iterator[int]:  # fmt: skip
    """As `modeling.generate.generate`, in the runtime; ends early where the model's context is full.

    Raises:
        InputError: the prompt is longer than the model's context. RunError: the logits are not finite.
    """
    if len(prompt_ids) > loaded.context:
        raise InputError(f"the prompt has {len(prompt_ids)} tokens, the model reads {loaded.context}; shorten it")
    session = loaded.session(min(len(prompt_ids) + max_new_tokens, loaded.context))
    sample = Sampler(temperature, top_p, seed)
    logits = session.eval(prompt_ids)
    for produced in range(1, max_new_tokens + 1):
        # Tokens outside a trimmed head have minus infinity.
        if np.isnan(logits).any() or not np.isfinite(logits.max()):
            raise RunError(f"model {loaded.path}: its logits are not finite; its weights are damaged, export it again")
        token = sample(logits)
        if token in stop_ids:
            return
        yield token
        if produced == max_new_tokens or session.length == loaded.context:
            return
        logits = session.eval([token])
