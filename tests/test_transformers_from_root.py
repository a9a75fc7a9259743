"""Our folder `kernels/` hides Hugging Face's package of that name; `transformers` must go on without it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_transformers_imports_and_runs_from_the_repository_root() -> None:
    code = (
        "import kernels, torch; from transformers import LlamaConfig, LlamaForCausalLM\n"
        "c = LlamaConfig(vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)\n"
        "print(kernels.__file__, LlamaForCausalLM(c)(torch.tensor([[1, 2]])).logits.shape[-1])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    file, size = done.stdout.split()
    assert Path(file).parent == ROOT / "kernels" and size == "16"
