"""Triton's kernels of experts on a GPU: grouped products against dense ones, four bits against the speed of the memory.

    python benchmarks/triton_moe.py              # minutes on one GPU; needs the extra `triton`
    python benchmarks/triton_moe.py --only decode

Tables:
    grouped   rows in bf16 through experts, forward and with both gradients, with uneven counts; beside it a dense product of
              the same number of operations (aim: 75 % of its rate) and torch's own grouped_mm where this torch has it
    decode    one token through its experts with weights of four bits: bytes a second, beside a plain copy kernel of
              Triton moving as many bytes in the same run (aim: 70 % for 16 M weights and more)
    layer     gate and up, SwiGLU, down and the mix, at several numbers of tokens: W4A16 and W4A8 on both paths, and bf16

A figure is the median of calls timed by the GPU's own clock with the L2 cache emptied in between. Refuses to print while the
tests of these kernels are red on this GPU. Without a GPU it says so and exits with 2.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

import kernels.triton as kt  # noqa: E402
from benchmarks._triton_copy import copy_rate  # noqa: E402
from tests.helpers.triton_inputs import draw, draw_experts, draw_ids  # noqa: E402

TESTS = ("tests/kernels/test_triton_grouped.py", "tests/kernels/test_triton_permute.py", "tests/kernels/test_triton_w4.py")
# name: experts, experts a token, hidden size, width of an expert
SHAPES = {
    "MobileMoE-S": (60, 4, 768, 384),
    "MobileMoE-L": (60, 4, 1280, 640),
    "8 x 2048 -> 8192": (8, 2, 2048, 4096),  # large enough that a launch is no part of it
}
GROUPED_TOKENS = 8192
LAYER_TOKENS = (1, 16, 256, 4096)
GROUPED_AIM, DECODE_AIM = 0.75, 0.70
DECODE_AIM_WEIGHTS = 16 << 20

Timer = Callable[[Callable[[], object]], float]
"""Median seconds of a call."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=sorted(TABLES), help="one table (default: all)")
    options = parser.parse_args()
    if not torch.cuda.is_available() or not kt.installed():
        lacking = "no package triton" if torch.cuda.is_available() else "no CUDA device"
        sys.stderr.write(f"error: {lacking} here; this benchmark measures a GPU: run it where there is one\n")
        return 2
    from benchmarks import train_step

    train_step.TESTS = TESTS  # type: ignore[misc]
    train_step.require_green()
    device = torch.device("cuda")
    lines = [f"{key}: {value}" for key, value in train_step.conditions().items()]
    lines.append(f"GPU: {torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}, triton {_triton_version()}")
    for name, table in TABLES.items():
        if options.only in (None, name):
            lines += ["", *table(device, gpu_seconds)]
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


def gpu_seconds(call: Callable[[], object]) -> float:
    from triton.testing import do_bench

    milliseconds: float = do_bench(call, warmup=50, rep=200, return_mode="median")
    return milliseconds / 1e3


def grouped(device: torch.device, seconds: Timer, tokens: int = GROUPED_TOKENS) -> list[str]:
    """Rates of a grouped product as shares of a dense one's."""
    header = f"{'grouped, bf16':<24}{'product':<18}{'dense':>12}{'ours':>22}{'grouped_mm':>22}"
    lines = [header]
    for name, (experts, k, hidden, width) in SHAPES.items():
        rows = tokens * k
        counts = torch.bincount(draw_ids(rows, below=experts), minlength=experts).to(device)
        offsets = counts.cumsum(0).to(torch.int32)
        for inputs, outputs in ((hidden, 2 * width), (width, hidden)):
            x = draw(rows, inputs, dtype=torch.bfloat16, device=device).requires_grad_()
            weight = draw(experts, inputs, outputs, seed=1, dtype=torch.bfloat16, device=device).requires_grad_()
            one = weight.detach()[0].clone().requires_grad_()
            upstream = draw(rows, outputs, seed=2, dtype=torch.bfloat16, device=device)
            contenders: list[Callable[[], Tensor] | None] = [
                functools.partial(torch.matmul, x, one), functools.partial(kt.grouped_linear, x, weight, counts),
                _grouped_mm(x, weight, offsets),
            ]  # fmt: skip
            for label, products in (("forward", 1), ("and gradients", 3)):
                rates: list[float | None] = []
                for call, matrix in zip(contenders, (one, weight, weight), strict=True):
                    step = call and _step(call, (x, matrix), upstream if products == 3 else None)
                    rates.append(step and 2 * rows * inputs * outputs * products / seconds(step))
                cells = "".join(_share(rate, rates[0]) for rate in rates[1:])
                lines.append(f"{name:<24}{f'{inputs} -> {outputs}':<18}{_tera(rates[0]):>12}{cells}  {label}")
    return [*lines, f"aim: ours at {GROUPED_AIM:.0%} of dense; {tokens} tokens; TFLOP/s"]


def decode(device: torch.device, seconds: Timer) -> list[str]:
    """Bytes a second of one token's products, as shares of a copy's."""
    lines = [f"{'decode, one token':<24}{'product':<18}{'axis':<8}{'MB':>8}{'copy GB/s':>12}{'W4A16':>22}{'W4A8':>22}"]
    for name, (experts, k, hidden, width) in SHAPES.items():
        chosen = torch.arange(k, device=device)
        for inputs, outputs, share in ((hidden, 2 * width, k), (width, hidden, 1)):
            for axis in ("input", "output"):
                weight = draw_experts(experts, inputs, outputs, axis).to(device)
                x = draw(k // share, inputs, dtype=torch.bfloat16, device=device)
                codes, scales = kt.quantize_rows(x)
                touched = k * (weight.codes[0].numel() + 2 * weight.scales[0].numel()) + x.numel() * 2 + k * outputs * 2
                copied = copy_rate(touched, device, seconds)
                calls = (functools.partial(kt.matvec_w4, x, weight, chosen),
                         functools.partial(kt.matvec_w4, codes, weight, chosen, scales=scales, dtype=x.dtype))  # fmt: skip
                rates = [touched / seconds(call) for call in calls]
                cells = "".join(f"{f'{rate / 1e9:.0f} ({rate / copied:.0%})':>22}" for rate in rates)
                cells += "  *" if k * inputs * outputs >= DECODE_AIM_WEIGHTS else ""
                product = f"{f'{inputs} -> {outputs}':<18}{axis:<8}{touched / 1e6:>8.1f}{copied / 1e9:>12.0f}"
                lines.append(f"{name:<24}{product}{cells}")
    return [*lines, f"aim: {DECODE_AIM:.0%} of the copy where {DECODE_AIM_WEIGHTS >> 20} M weights or more are read (*)"]


def layer(device: torch.device, seconds: Timer, tokens: tuple[int, ...] = LAYER_TOKENS) -> list[str]:
    """Microseconds of a layer of experts: shows from how many tokens on sorting pays."""
    kinds = [(fn, path) for fn in (kt.moe_w4a16, kt.moe_w4a8) for path in ("decode", "prefill")]
    titles = [*(f"{fn.__name__[4:]} {path}" for fn, path in kinds), "bf16"]
    lines = [f"{'layer, us':<24}{'tokens':>8}" + "".join(f"{title:>16}" for title in titles)]
    for name, (experts, k, hidden, width) in SHAPES.items():
        gate_up, down = (draw_experts(experts, *size, "input").to(device) for size in ((hidden, 2 * width), (width, hidden)))
        whole = [draw(experts, *size, dtype=torch.bfloat16, device=device) for size in ((hidden, 2 * width), (width, hidden))]
        for count in tokens:
            x, mix = draw(count, hidden, dtype=torch.bfloat16, device=device), draw(count, k, seed=1, device=device).sigmoid()
            ids = draw(count, experts, seed=2, device=device).topk(k).indices
            calls: list[Callable[[], object]] = [
                functools.partial(fn, x, ids, mix, gate_up, down, path=path) for fn, path in kinds
            ]
            times = [seconds(call) for call in (*calls, functools.partial(_bf16_layer, x, ids, mix, *whole))]
            lines.append(f"{name:<24}{count:>8}" + "".join(f"{1e6 * taken:>16.0f}" for taken in times))
    return lines


TABLES: dict[str, Callable[[torch.device, Timer], list[str]]] = {"grouped": grouped, "decode": decode, "layer": layer}


def _bf16_layer(x: Tensor, ids: Tensor, mix: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    with torch.no_grad():
        plan = kt.plan_dropless(ids, len(gate_up))
        hidden = kt.swiglu_rows(kt.grouped_linear(kt.gather_rows(x, plan), gate_up, plan.load))
        result: Tensor = kt.combine_rows(kt.grouped_linear(hidden, down, plan.load), mix, plan)
        return result


def _grouped_mm(x: Tensor, weight: Tensor, offsets: Tensor) -> Callable[[], Tensor] | None:
    """torch's own product of the same, or None where this torch or this GPU has none."""
    call = getattr(torch.nn.functional, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)
    if call is None:
        return None
    try:
        call(x, weight, offs=offsets)
    except RuntimeError:
        return None
    return functools.partial(call, x, weight, offs=offsets)


def _step(call: Callable[[], Tensor], inputs: tuple[Tensor, Tensor], upstream: Tensor | None) -> Callable[[], object]:
    return torch.no_grad()(call) if upstream is None else lambda: torch.autograd.grad(call(), inputs, upstream)


def _share(rate: float | None, dense: float | None) -> str:
    return f"{'not here':>22}" if rate is None or dense is None else f"{f'{_tera(rate)} ({rate / dense:.0%})':>22}"


def _tera(rate: float | None) -> str:
    return "" if rate is None else f"{rate / 1e12:.1f}"


def _triton_version() -> str:
    import triton

    return str(triton.__version__)


if __name__ == "__main__":
    sys.exit(main())
