"""A training step of one mixture-of-experts layer on a CPU: ours, loops over experts, and other libraries' layers.

    python -m benchmarks.moe_layer [--rounds 5]

Forward and backward pass, one thread, fp32, 60 experts of which a token uses four, softmax routing, no shared expert: what
all contenders have. Before a layer is timed its output and its gradient are held to ours. Contenders:

    loop           our layer with the plain loop over experts that specifies it: both expert tensors indexed in the loop
    loop_modules   a loop over `nn.Linear`s, one pair an expert, with `index_add`: what Mixtral's first code did
    hf_loop        transformers' Qwen3-MoE block, its loop ("eager")
    hf_grouped     the same block with torch's grouped product ("grouped_mm")
    torchtitan     its MoE layer, where torchtitan is installed

Refuses to print while the tests of the layer are red.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import train_step
from kernels import grouped
from modeling import experts as experts_module
from modeling.config import ModelConfig
from modeling.moe import MoE, RoutingRecord
from modeling.moe_config import MoEConfig
from stages.distributed import keep_freed_memory

CASES = ((768, 384, 512), (768, 384, 2048), (256, 96, 1024), (128, 48, 512), (128, 48, 2048))
"""Hidden size, width of an expert, tokens. The first two are MobileMoE-S's layer."""
QUIET_LOAD = 1.5
Layer = Callable[[Tensor], Tensor]


class LoopOverModules(nn.Module):
    """The same weights in one pair of linears an expert."""

    def __init__(self, layer: MoE) -> None:
        super().__init__()
        self.router = layer.router
        self.gate_up, self.down = (nn.ModuleList(_linear(w.T) for w in getattr(layer.experts, part).detach())
                                   for part in ("gate_up", "down"))  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        experts, mix, _, _ = self.router(rows)
        out = torch.zeros_like(rows)
        for index, (gate_up, down) in enumerate(zip(self.gate_up, self.down, strict=True)):
            token, rank = torch.where(experts == index)
            gate, up = gate_up(rows[token]).chunk(2, -1)
            out = out.index_add(0, token, down(F.silu(gate) * up) * mix[token, rank].unsqueeze(-1))
        return out.view_as(x)


def _linear(weight: Tensor) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    made.weight = nn.Parameter(weight.clone())
    return made


def build(hidden: int, width: int) -> MoE:
    moe = MoEConfig(num_experts=60, top_k=4, expert_size=width, score="softmax")
    layer = MoE(ModelConfig(vocab_size=2, hidden_size=hidden, num_layers=1, num_heads=2, num_kv_heads=1, ffn_size=4 * hidden,
                            moe=moe))  # fmt: skip
    torch.manual_seed(0)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.02)
    return layer


def transformers_block(layer: MoE, implementation: str) -> nn.Module:
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    moe, hidden = layer.moe, layer.experts.gate_up.shape[1]
    config = Qwen3MoeConfig(hidden_size=hidden, moe_intermediate_size=moe.expert_size, num_experts=moe.num_experts,
                            num_experts_per_tok=moe.top_k, norm_topk_prob=True)  # fmt: skip
    config._experts_implementation = implementation
    block = Qwen3MoeSparseMoeBlock(config)
    state = {"gate.weight": layer.router.weight, "experts.gate_up_proj": layer.experts.gate_up.transpose(1, 2),
             "experts.down_proj": layer.experts.down.transpose(1, 2)}  # fmt: skip
    block.load_state_dict({name: value.detach().contiguous() for name, value in state.items()})
    return block


def torchtitan_layer(layer: MoE) -> nn.Module:
    """torchtitan 0.2.2's MoE with its loop over experts, the form that runs without a GPU."""
    from torchtitan.models import moe as titan

    args = titan.MoEArgs(num_experts=layer.moe.num_experts, num_shared_experts=0, top_k=layer.moe.top_k, score_func="softmax",
                         route_norm=True, score_before_experts=False, use_grouped_mm=False)  # fmt: skip
    made = titan.MoE(args, dim=layer.experts.gate_up.shape[1], hidden_dim=layer.moe.expert_size)
    gate, up = layer.experts.gate_up.detach().chunk(2, -1)
    with torch.no_grad():
        made.router.gate.weight.copy_(layer.router.weight)
        for name, value in (("w1", gate), ("w3", up), ("w2", layer.experts.down)):
            getattr(made.experts, name).copy_(value.transpose(1, 2))
        made.expert_bias.zero_()
    histc = torch.histc  # not there for whole numbers on a CPU
    torch.histc = lambda x, bins, min, max: histc(x.float(), bins, min, max)  # type: ignore[assignment]
    return made


def contenders(layer: MoE) -> dict[str, Layer]:
    """Name -> layer with the same weights."""
    found: dict[str, Layer] = {"ours": lambda x: layer(x, RoutingRecord()), "loop": lambda x: _with_loop(layer, x),
                               "loop_modules": LoopOverModules(layer)}  # fmt: skip
    found |= {"hf_loop": transformers_block(layer, "eager"), "hf_grouped": transformers_block(layer, "grouped_mm")}
    if importlib.util.find_spec("torchtitan"):
        found["torchtitan"] = torchtitan_layer(layer)
    return found


def _with_loop(layer: MoE, x: Tensor) -> Tensor:
    experts_module.grouped_linear = grouped.grouped_linear_loop
    try:
        return layer(x, RoutingRecord())
    finally:
        experts_module.grouped_linear = grouped.grouped_linear


def step(layer: Layer, x: Tensor) -> tuple[Tensor, Tensor]:
    """Output, and gradient of the input, of a step; weights' gradients are made anew, as after `zero_grad`."""
    if isinstance(layer, nn.Module):
        layer.zero_grad(set_to_none=True)
    x.grad = None
    out = layer(x)
    out = out[0] if isinstance(out, tuple) else out
    out.backward(torch.ones_like(out))
    assert x.grad is not None
    return out.detach(), x.grad


def measure(hidden: int, width: int, tokens: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of `rounds` steps of each, in turn."""
    layer = build(hidden, width)
    x = torch.randn(1, tokens, hidden, generator=torch.Generator().manual_seed(1)).requires_grad_()
    layers, seconds = contenders(layer), {}
    want = step(layers["ours"], x)
    for name, one in layers.items():
        for got, expected in zip(step(one, x), want, strict=True):
            if not torch.allclose(got, expected, atol=1e-4, rtol=1e-3):
                sys.exit(f"no figures: {name} is {float((got - expected).abs().max()):.3g} from ours")
        seconds[name] = []
    for _ in range(rounds):
        for name, one in layers.items():
            layer.zero_grad(set_to_none=True)
            begin = time.perf_counter()
            step(one, x)
            seconds[name].append(time.perf_counter() - begin)
    return seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    train_step.TESTS = ("tests/kernels/test_grouped.py", "tests/modeling/test_moe.py")  # type: ignore[misc]
    train_step.require_green()
    torch.set_num_threads(1)
    keep_freed_memory()  # as a training process does
    lines: list[Any] = [f"{key}: {value}" for key, value in train_step.conditions().items()]
    loads = [os.getloadavg()[0]]
    lines.append(f"one thread, fp32, forward and backward, {rounds} rounds; ms of a step, ratio of theirs to ours")
    for case in CASES:
        seconds = measure(*case, rounds)
        loads.append(os.getloadavg()[0])
        ours = statistics.median(seconds["ours"])
        for name, times in seconds.items():
            label = f"hidden {case[0]}, width {case[1]}, {case[2]} tokens" if name == "ours" else ""
            lines.append(f"{label:<38}{name:<14}{1e3 * statistics.median(times):>9.1f}{statistics.median(times) / ours:>8.2f}")
    lines.append(f"load before: {loads[0]:.1f}, highest while measuring: {max(loads):.1f}")
    if max(loads) > QUIET_LOAD:
        lines.append("THE MACHINE WAS NOT QUIET: do not quote these figures")
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
