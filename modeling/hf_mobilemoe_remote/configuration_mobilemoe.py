"""Configuration of MobileMoE (arXiv 2605.27358) for `transformers`, written beside an export by Pocketforge."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig


class MobileMoEConfig(PretrainedConfig):
    """Keys are those of the released checkpoints; all of config.json arrives here, and stays as it is."""

    model_type = "mobilemoe"
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(
        self, vocab_size: int = 128_256, hidden_size: int = 768, intermediate_size: int = 384,
        intermediate_size_mlp: int = 1536, num_hidden_layers: int = 20, num_attention_heads: int = 12,
        num_key_value_heads: int = 4, head_dim: int = 64, max_position_embeddings: int = 8192, rms_norm_eps: float = 1e-5,
        rope_theta: float = 500_000.0, rope_scaling: dict[str, Any] | None = None,
        rope_parameters: dict[str, Any] | None = None, num_local_experts: int = 60, num_experts_per_tok: int = 4,
        routed_scaling_factor: float = 2.5, norm_topk_prob: bool = True, use_qk_norm: bool = True,
        initializer_range: float = 0.02, quantization: dict[str, Any] | None = None, tie_word_embeddings: bool = True,
        use_cache: bool = True, **others: Any,
    ) -> None:  # fmt: skip
        self.vocab_size, self.hidden_size, self.num_hidden_layers = vocab_size, hidden_size, num_hidden_layers
        self.intermediate_size, self.intermediate_size_mlp = intermediate_size, intermediate_size_mlp
        self.num_attention_heads, self.num_key_value_heads = num_attention_heads, num_key_value_heads
        self.head_dim, self.max_position_embeddings, self.rms_norm_eps = head_dim, max_position_embeddings, rms_norm_eps
        self.num_local_experts, self.num_experts_per_tok = num_local_experts, num_experts_per_tok
        self.routed_scaling_factor, self.norm_topk_prob = routed_scaling_factor, norm_topk_prob
        self.use_qk_norm, self.initializer_range = use_qk_norm, initializer_range
        self.quantization, self.use_cache = quantization, use_cache
        super().__init__(**{"tie_word_embeddings": tie_word_embeddings, **others})
        # After the base class, which has its own idea of this one that changes from version to version.
        self.rope_parameters = {"rope_type": "default", "rope_theta": rope_theta, **(rope_scaling or rope_parameters or {})}
