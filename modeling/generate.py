"""Decoding with a key/value cache, for evaluation, samples and tests. The quantized runtime has its own."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor

from modeling.decoder import Decoder, KVCache, spread_logits

__all__ = ["KVCache", "generate", "sample"]


def generate(
    model: Decoder, prompt_ids: Sequence[int], max_new_tokens: int, *, temperature: float = 0.0, top_p: float = 1.0,
    seed: int = 0, stop_ids: Collection[int] = (),
) -> Iterator[int]:  # fmt: skip
    """Yield new token ids one by one; a stop id ends the text and is not yielded.

    Args:
        prompt_ids: at least one id.
        temperature: 0 takes the likeliest token, else softmax(logits / temperature) is sampled.
        top_p: sample among the likeliest tokens that together reach this probability (Holtzman et al., 1904.09751).

    Raises:
        ValueError: an empty prompt.
    """
    if not prompt_ids:
        raise ValueError("the prompt has no tokens; give at least one")
    weight = model.embed.weight
    cache = KVCache(model.config, 1, len(prompt_ids) + max_new_tokens, weight.dtype, weight.device)
    generator = torch.Generator(device=weight.device).manual_seed(seed)
    tokens = torch.tensor([list(prompt_ids)], device=weight.device)
    for _ in range(max_new_tokens):
        with torch.no_grad():
            hidden = model.hidden(tokens, cache=cache)[:, -1:]
            x, head = model.head_operands(hidden)
            token = sample(spread_logits((x @ head.T)[0, 0].float(), model.config), temperature, top_p, generator)
        if token in stop_ids:
            return
        yield token
        tokens = torch.tensor([[token]], device=weight.device)


def sample(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """One id from logits [V]."""
    if temperature == 0:
        return int(logits.argmax())
    # From the largest down, and never divided by a denormal: a tiny temperature tends to the likeliest token, not to nan.
    scaled = (logits - logits.max()) / max(temperature, 1e-30)
    probabilities, order = torch.softmax(scaled, -1).sort(descending=True)
    # A token stays while what stands before it has not reached top_p, so the likeliest always does.
    probabilities[probabilities.cumsum(-1) - probabilities >= top_p] = 0
    return int(order[torch.multinomial(probabilities, 1, generator=generator)])
