"""The files that fuzzing starts from: tiny real models of every architecture and encoding.

    python -m tests.kernels.make_corpus FOLDER
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

from modeling.config import ModelConfig
from modeling.moe_config import MoEConfig
from quant.spec import QuantSpec
from tests.helpers.packed_models import packed

TINY: dict[str, Any] = dict(vocab_size=17, hidden_size=32, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=32, ffn_size=32,
                            max_positions=24, window=5)  # fmt: skip
VARIANTS: tuple[dict[str, Any], ...] = (
    {}, {"attention": ("window",)}, {"attention": ("skip",)}, {"tie_embeddings": False, "qk_norm": True}, {"block_repeat": 2},
    {"moe": MoEConfig(num_experts=3, top_k=2, expert_size=32, shared_size=32)},
    {"moe": MoEConfig(num_experts=2, top_k=1, expert_size=32, score="softmax", dense_layers=1), "num_layers": 2},
)  # fmt: skip


def make(folder: Path) -> None:
    """One file a variant; every second one with an INT8 embedding."""
    folder.mkdir(parents=True, exist_ok=True)
    variants = [(extra, QuantSpec()) for extra in VARIANTS] + [(VARIANTS[-2], QuantSpec(expert_axis="output"))]
    for index, (extra, spec) in enumerate(variants):
        with tempfile.TemporaryDirectory() as scratch:
            config = ModelConfig(**{**TINY, **extra})
            _, path = packed(config, Path(scratch), spec=spec, embedding="int8" if index % 2 else "int4")
            (folder / f"{index}.pocket").write_bytes(path.read_bytes())


if __name__ == "__main__":
    make(Path(sys.argv[1]))
