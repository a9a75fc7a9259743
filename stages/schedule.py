"""Learning rates as pure functions of the step: nothing to save, nothing to get wrong on resume."""

from __future__ import annotations

import math

from stages.config import OptimConfig


def learning_rate(config: OptimConfig, step: int, total_steps: int) -> float:
    """The rate of optimizer step `step`, counted from 1 to `total_steps`.

    Warm-up is linear and reaches the peak at step `warmup_steps`. The last step of `cosine`, `linear` and `wsd` has
    the rate `min_lr_ratio * lr`; `wsd` (warm-up, stable, decay) stays at the peak and falls linearly over its last
    `decay_steps`.
    """
    if step <= config.warmup_steps:
        return config.lr * step / config.warmup_steps
    match config.schedule:
        case "constant":
            share = 1.0
        case "wsd":
            share = _falling(total_steps - config.decay_steps, step, total_steps)
        case "linear":
            share = _falling(config.warmup_steps, step, total_steps)
        case "cosine":
            share = 0.5 * (1.0 + math.cos(math.pi * (1.0 - _falling(config.warmup_steps, step, total_steps))))
    return config.lr * (config.min_lr_ratio + (1.0 - config.min_lr_ratio) * share)


def _falling(start: int, step: int, end: int) -> float:
    """1 up to `start`, 0 from `end`, linear between."""
    if step <= start:
        return 1.0
    return max(0.0, (end - step) / (end - start)) if end > start else 0.0
