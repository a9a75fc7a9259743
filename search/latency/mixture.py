"""What a mixture of experts adds to the features: its router, rows that are sorted to experts and back, experts in use.

All are 0 for a dense model. As many experts as are in use is an expectation: each token is taken to choose independently, and
every expert is taken to be as likely as any other.
"""

from __future__ import annotations

from modeling.config import ModelConfig
from modeling.moe_config import MoEConfig

BYTES_A_WEIGHT = 0.5625
"""Four bits, and a half-precision scale for every 32."""
TIMES = ("router_gflop", "router_m", "expert_rows_m", "expert_calls_k", "experts_mb")
"""Of the router: products, and scores to choose among. Hidden elements that are gathered for experts and added up again. Calls
of an expert, and bytes of the experts called: both count once an executed layer, and are what small groups of tokens cost
beyond their products, which are counted as a dense model's."""
MEMORY = ("expert_scratch_mb",)
PAIRS = 128
"""Rows of a group of experts that the runtime takes at once, at least."""


def touched(moe: MoEConfig, tokens: int) -> float:
    """Expected share of the routed experts that so many tokens use."""
    return 1 - (1 - moe.top_k / moe.num_experts) ** tokens


def idle_weights(config: ModelConfig, tokens: int) -> float:
    """Stored weights of experts that none of the tokens uses, as an expectation."""
    if config.moe is None:
        return 0.0
    experts = config.moe.num_experts * (1 - touched(config.moe, tokens))
    return config.num_moe_layers * experts * config.moe.expert_params(config.hidden_size)


def ffn_groups(config: ModelConfig) -> list[tuple[int, int]]:
    """(active width, executed layers) of the feed-forwards: two where only the first blocks are dense."""
    if config.moe is None:
        return [(config.ffn_size, config.num_executed_layers)]
    dense, mixed = config.num_layers - config.num_moe_layers, config.num_moe_layers
    return [(config.ffn_size, dense * config.block_repeat), (config.moe.active_size, mixed * config.block_repeat)]


def widest_row(config: ModelConfig) -> int:
    """Feed-forward width that all tokens of a batch have room for at once: routed experts have groups of rows."""
    if config.moe is None:
        return config.ffn_size
    return max(config.moe.shared_size, config.ffn_size if config.moe.dense_layers else 0)


def features(config: ModelConfig, tokens: int) -> dict[str, float]:
    """By name, of a pass of so many tokens."""
    moe = config.moe
    if moe is None:
        return dict.fromkeys((*TIMES, *MEMORY), 0.0)
    layers, hidden = config.num_moe_layers * config.block_repeat, config.hidden_size
    calls = layers * moe.num_experts * touched(moe, tokens)
    batch = min(tokens, 512)
    rows = max(batch, PAIRS)
    return {
        "router_gflop": 2e-9 * tokens * moe.num_experts * hidden * layers,
        "router_m": 1e-6 * tokens * moe.num_experts * layers,
        "expert_rows_m": 1e-6 * tokens * moe.top_k * hidden * layers,
        "expert_calls_k": 1e-3 * calls,
        "experts_mb": 1e-6 * BYTES_A_WEIGHT * calls * moe.expert_params(hidden),
        "expert_scratch_mb": 4e-6 * (rows * (2 * moe.expert_size + 1.5 * hidden) + batch * moe.num_experts),
    }
