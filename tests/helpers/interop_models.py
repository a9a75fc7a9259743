"""Small models with a tokenizer of their own for the tests of interchange formats."""

from __future__ import annotations

from dataclasses import replace

import torch

from data_pipeline.tokenizer import Tokenizer
from modeling.config import ModelConfig
from modeling.decoder import Decoder
from quant.spec import QuantSpec
from tests.helpers import packed_models

TEXT = (
    "The model reads a word, and then it guesses what the next word of this small text will be. It's been doing that\n"
    "since 1987 (or 12345 days), didn't it?  \n\n\tDer Bär träumt: naïve café, 東京で会う, здравствуй мир! 🙂\n"
    "def f(x):\n    return {'a': x ** 2, \"b\": [1, 22, 333, 4444]}  # WE'LL see\r\n"
)
VOCAB = 512
BASE = ModelConfig(vocab_size=VOCAB, hidden_size=128, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=32, ffn_size=192,
                   max_positions=256, init_std=0.08, window=24)  # fmt: skip
CONFIGS = {
    "plain": BASE,
    "wide_heads": replace(BASE, head_dim=64, num_kv_heads=1),
    "untied": replace(BASE, tie_embeddings=False, rope_theta=500_000.0),
    "shared": replace(BASE, block_repeat=2),
    "qk_norm": replace(BASE, qk_norm=True),
    "skip": replace(BASE, attention=("full", "skip", "full")),
    "window": replace(BASE, attention=("full", "window", "full")),
}


def tokenizer() -> Tokenizer:
    return Tokenizer.train([TEXT] * 4, VOCAB)


def build(config: ModelConfig, spec: QuantSpec | None = None) -> Decoder:
    """Random weights, prepared with `spec`; the norms are not all ones, groups have scales that differ by up to ten."""
    model = packed_models.build(config, spec=spec or QuantSpec())
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            spread = torch.rand(len(parameter), parameter.shape[1] // 32, generator=generator) * 2.3 - 1.15
            parameter *= spread.exp().repeat_interleave(32, dim=1)
    return model


def perplexity(logits: torch.Tensor, ids: list[int]) -> float:
    """exp of the mean negative log-likelihood of ids[1:] under logits [T, V]."""
    scores = logits[:-1].double().log_softmax(-1).gather(-1, torch.tensor(ids[1:]).unsqueeze(-1))
    return float((-scores.mean()).exp())
