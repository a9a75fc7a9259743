"""What the parts of a decoder do on real text, summed over tokens: the raw statistics behind every importance score.

Hooks read what already flows through the model; nothing in `modeling/` knows of them. Tokens that predict nothing
(padding) are left out of every sum.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modeling.decoder import Decoder, SkipBlock
from modeling.importance import norm_names


class Activations:
    """Sums of one pass or many, fp64, by name.

    | name | shape | sum over tokens of |
    | --- | --- | --- |
    | ffn.N.{abs,square} | [F] | what FFN N's down-projection reads |
    | heads.N.{abs,square} | [H * D] | what attention N's output projection reads |
    | normed.NAME.{abs,square} | [hidden] | what norm NAME gives |
    | energy.NAME | [hidden] | channel's share of the energy that norm NAME reads |
    | block.N, attention.N | [] | 1 - cosine of the residual stream before and after |
    | ffn.N.taylor, heads.N.taylor, hidden.taylor | [F], [H], [hidden] | abs(sum over a row of activation x gradient) |
    """

    def __init__(self, model: Decoder) -> None:
        self.model = model
        self.sums: dict[str, Tensor] = defaultdict(functools.partial(torch.zeros, (), dtype=torch.float64))
        self.tokens = 0
        self._counted = torch.empty(0)
        self._products: dict[str, Tensor] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Hooks are in place inside the block."""
        handles = [*self._watch_norms()]
        for index, block in enumerate(self.model.blocks):
            assert isinstance(block, nn.Module)
            handles += self._watch_block(index, block)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def batch(self, counted: Tensor) -> Iterator[None]:
        """One forward pass (and its backward pass, where there is one). `counted`: bool [B, T], tokens that count."""
        self._counted = counted.unsqueeze(-1)
        self.tokens += int(counted.sum())
        yield
        for name, product in self._products.items():
            self._add(name, product.abs().sum(dim=0))
        self._products = {}

    def mean(self, name: str) -> Tensor:
        """Mean over the counted tokens, fp64 on the CPU."""
        return self.sums[name].cpu() / max(self.tokens, 1)

    def _add(self, name: str, value: Tensor) -> None:
        self.sums[name] = self.sums[name].to(value.device) + value.double()

    def _magnitudes(self, name: str, x: Tensor) -> None:
        x = torch.where(self._counted, x.detach(), 0)
        self._add(f"{name}.abs", x.abs().sum(dim=(0, 1)))
        self._add(f"{name}.square", x.square().sum(dim=(0, 1)))

    def _taylor(self, name: str, x: Tensor, groups: int) -> None:
        """First order in the loss: taking a part away changes it by -sum(activation x gradient) (Molchanov et al. 2019,
        arXiv 1906.10771, equation 7, on activations). Kept signed within a row, over all places the part appears in."""
        if not x.requires_grad:
            return
        value = x.detach()

        def received(grad: Tensor) -> None:
            product = (value * grad).sum(dim=1).unflatten(-1, (groups, -1)).sum(dim=-1)
            self._products[name] = self._products.get(name, torch.zeros_like(product)) + product

        x.register_hook(received)

    def _watch_norms(self) -> Iterator[Any]:
        for name in norm_names(self.model.config):

            def seen(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor, name: str = name) -> None:
                self._magnitudes(f"normed.{name}", output)
                self._taylor("hidden.taylor", output, output.shape[-1])
                energy = inputs[0].detach().float().square()
                share = energy / energy.sum(dim=-1, keepdim=True).clamp(min=1e-30)
                self._add(f"energy.{name}", torch.where(self._counted, share, 0).sum(dim=(0, 1)))

            yield self.model.get_submodule(name).register_forward_hook(seen)

    def _watch_block(self, index: int, block: nn.Module) -> list[Any]:
        config, handles = self.model.config, []

        def ffn_reads(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self._magnitudes(f"ffn.{index}", inputs[0])
            self._taylor(f"ffn.{index}.taylor", inputs[0], config.ffn_size)

        def output_reads(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self._magnitudes(f"heads.{index}", inputs[0])
            self._taylor(f"heads.{index}.taylor", inputs[0], config.num_heads)

        def block_ends(_: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            self._turn(f"block.{index}", inputs[0], output)

        handles += [block.get_submodule("feed_forward.down").register_forward_pre_hook(ffn_reads),
                    block.register_forward_hook(block_ends)]  # fmt: skip
        if isinstance(block, SkipBlock):
            return handles
        stream: list[Tensor] = []

        def attention_begins(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            stream[:] = [inputs[0]]

        def attention_ends(_: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            self._turn(f"attention.{index}", stream[0], stream[0] + output)

        return handles + [
            block.get_submodule("attention.o").register_forward_pre_hook(output_reads),
            block.get_submodule("attention_norm").register_forward_pre_hook(attention_begins),
            block.get_submodule("attention").register_forward_hook(attention_ends),
        ]

    def _turn(self, name: str, before: Tensor, after: Tensor) -> None:
        """ShortGPT's block influence (Men et al. 2024, arXiv 2403.03853, equation 1); passes of one block add up."""
        cosine = F.cosine_similarity(before.detach().float(), after.detach().float(), dim=-1)
        self._add(name, torch.where(self._counted.squeeze(-1), 1 - cosine, 0).sum())
