"""What a mixture of experts is, as data: how many, how wide, how the router chooses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le

ScoreFunction = Literal["sigmoid", "softmax"]


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """Experts in place of a block's feed-forward (MobileMoE, arXiv 2605.27358; DeepSeek-V3, arXiv 2412.19437).

    Of `num_experts` routed SwiGLU experts `top_k` take part in a token, chosen by score plus a balance bias and mixed
    by their unbiased scores; a shared expert, where there is one, takes part in every token and is added as it is.
    """

    __pydantic_config__ = {"extra": "forbid", "allow_inf_nan": False}

    num_experts: Annotated[int, Ge(1), Le(65_536)]
    """Routed experts of a layer."""
    top_k: Annotated[int, Ge(1), Le(65_536)]
    expert_size: Annotated[int, Ge(1), Le(2**31 - 1)]
    """Feed-forward width of a routed expert. `ffn_size` over this is the granularity."""
    shared_size: Annotated[int, Ge(0), Le(2**31 - 1)] = 0
    """Feed-forward width of the shared expert; 0 is none."""
    score: ScoreFunction = "sigmoid"
    """What makes scores of the router's logits; softmax goes over all experts."""
    normalize: bool = True
    """Divide the chosen scores by their sum, so that the mixing weights of a token add up to `route_scale`."""
    route_scale: Annotated[float, Gt(0)] = 1.0
    dense_layers: Annotated[int, Ge(0), Le(2**31 - 1)] = 0
    """The first so many blocks keep a dense feed-forward of `ffn_size`."""

    def __post_init__(self) -> None:
        for name in ("num_experts", "top_k", "expert_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.moe.{name}={getattr(self, name)} must be at least 1")
        for name in ("shared_size", "dense_layers"):
            if getattr(self, name) < 0:
                raise ValueError(f"model.moe.{name}={getattr(self, name)} must not be negative")
        if self.top_k > self.num_experts:
            raise ValueError(f"model.moe.top_k={self.top_k} is more than model.moe.num_experts={self.num_experts}; "
                             "a token cannot use more experts than there are")

    @property
    def active_size(self) -> int:
        """Feed-forward width that takes part in one token: that of a dense model as dear."""
        return self.top_k * self.expert_size + self.shared_size

    def expert_params(self, hidden_size: int) -> int:
        """Weights of one routed expert."""
        return 3 * hidden_size * self.expert_size

    def router_params(self, hidden_size: int) -> int:
        """Weights of a layer's router. The balance bias is state that no gradient reaches, and is not counted."""
        return self.num_experts * hidden_size

    def layer_params(self, hidden_size: int) -> int:
        """Weights of a layer's router and experts, the shared one included."""
        return self._always(hidden_size) + self.num_experts * self.expert_params(hidden_size)

    def active_layer_params(self, hidden_size: int) -> int:
        """Those that take part in one token."""
        return self._always(hidden_size) + self.top_k * self.expert_params(hidden_size)

    def _always(self, hidden_size: int) -> int:
        return self.router_params(hidden_size) + 3 * hidden_size * self.shared_size
