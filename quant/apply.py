"""A spec on a model: `prepare` for training (fake quantization), `convert` for export (integers and scales).

Prepared layers are the same modules with the same parameters: only their class changes. State-dict names, optimizer
state, sharding and tying are those of the plain model, so one checkpoint serves both.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.grouped import grouped_linear
from kernels.products import linear
from modeling.experts import Experts
from modeling.layers import Embedding, Linear
from quant.methods import WEIGHT_METHODS
from quant.methods.minmax import fake_quantize_activations
from quant.primitives import QuantError, check_groups, dequantize, group_scales, quantize
from quant.spec import QuantSpec


class _FakeQuant:
    """What prepared layers share."""

    quant: QuantSpec
    frozen = False
    """The weights lie on their grid already and need no rounding."""

    def rounded(self, weight: Tensor) -> Tensor:
        """Rows [..., in] of the weight on their grid."""
        return weight if self.frozen else WEIGHT_METHODS[self.quant.method](weight, self.quant)


class FakeQuantExperts(_FakeQuant, Experts):
    """Experts whose matrices and inputs are rounded. The router is no part of them: it stays fp32."""

    def compute(self, rows: Tensor, counts: Tensor | None, gate_up: Tensor, down: Tensor) -> Tensor:
        rows = fake_quantize_activations(rows, self.quant)
        gate, up = grouped_linear(rows, self._rounded(gate_up), counts).chunk(2, dim=-1)
        hidden = fake_quantize_activations(F.silu(gate) * up, self.quant)
        return grouped_linear(hidden, self._rounded(down), counts)

    def _rounded(self, weight: Tensor) -> Tensor:
        return grouped_last(self.rounded(grouped_last(weight, self.quant)), self.quant)


def grouped_last(weight: Tensor, spec: QuantSpec) -> Tensor:
    """Expert tensor [E, in, out] with the axis of its groups last, as a view; the same again turns it back."""
    return weight.transpose(1, 2) if spec.expert_axis == "input" else weight


class FakeQuantLinear(_FakeQuant, Linear):
    """A linear whose weight and input are rounded to their integer grids, with straight-through gradients."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(*self.head_operands(x))

    def head_operands(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Rounded input and weight: what a loss over an untied head multiplies."""
        return fake_quantize_activations(hidden, self.quant), self.rounded(self.weight)


class FakeQuantEmbedding(_FakeQuant, Embedding):
    """An embedding on its integer grid. A tied head multiplies the same rounded table by rounded activations."""

    def forward(self, ids: Tensor) -> Tensor:
        # Rows are quantized on their own, so rounding those that were looked up gives the rounded table's rows.
        return self.rounded(F.embedding(ids, self.weight))

    def head_operands(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Rounded hidden states and table."""
        return fake_quantize_activations(hidden, self.quant), self.rounded(self.weight)


_PREPARED: dict[type[nn.Module], type[nn.Module]] = {
    Linear: FakeQuantLinear, Embedding: FakeQuantEmbedding, Experts: FakeQuantExperts,
}  # fmt: skip


def prepare(model: nn.Module, spec: QuantSpec) -> nn.Module:
    """Make every linear and expert (and the embedding, where the spec says so) of `model` quantization-aware, in place.

    Call it before sharding and compiling; on a meta-device model it works too. Preparing again with the same spec
    changes nothing.

    Raises:
        QuantError: a row that the group size does not divide, a model prepared otherwise, or one without linears.
    """
    wanted = (Linear, Experts, Embedding) if spec.embedding else (Linear, Experts)
    targets = {name: module for name, module in model.named_modules() if isinstance(module, wanted)}
    if not any(isinstance(module, Linear) for module in targets.values()):
        raise QuantError("the model has no linear to quantize; expected one made of modeling.layers.Linear")
    for name, module in targets.items():
        for part, weight in _weights(name, module):
            check_groups(part, (grouped_last(weight, spec) if weight.ndim == 3 else weight).shape[-1], spec)
        if getattr(module, "quant", spec) != spec:
            raise QuantError(f"{name} is prepared with {module.quant}; start from the plain model to use {spec}")
    for module in targets.values():
        # The class changes, the object stays: parameters, hooks and references from elsewhere are untouched.
        module.__class__ = next(prepared for plain, prepared in _PREPARED.items() if isinstance(module, plain))  # type: ignore[assignment]
        cast(_FakeQuant, module).quant = spec
    return model


def _weights(name: str, module: nn.Module) -> list[tuple[str, Tensor]]:
    """State-dict names of a module's own matrices."""
    return [(f"{name}.{part}", weight) for part, weight in module.named_parameters(recurse=False)]


def quantized_weights(model: nn.Module) -> dict[str, QuantSpec]:
    """State-dict name of every weight that `prepare` made quantization-aware, with its spec."""
    return {
        part: cast(QuantSpec, module.quant)
        for name, module in model.named_modules()
        if isinstance(module, FakeQuantLinear | FakeQuantEmbedding | FakeQuantExperts)
        for part, _ in _weights(name, module)
    }  # fmt: skip


@torch.no_grad()
def convert(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """Integers of a prepared model: name -> (int8 codes [rows, in], fp16 scales [rows, in / group_size]).

    Those of experts are [E, out, in] and [E, out, in / group_size], or with groups along the outputs [E, in, out] and
    [E, in, out / group_size]: as `grouped_last` turns them.

    Raises:
        QuantError: the model is not prepared, or a weight is NaN or infinite.
    """
    specs = quantized_weights(model)
    if not specs:
        raise QuantError("the model is not prepared for quantization; call prepare(model, spec) first")
    if any(getattr(module, "frozen", False) for module in model.modules()):
        raise QuantError("the model is frozen on its grid, whose scales are gone; convert it before freeze(model)")
    return {name: _convert(model, name, spec) for name, spec in specs.items()}


@torch.no_grad()
def convert_weight(model: nn.Module, name: str) -> tuple[Tensor, Tensor]:
    """As `convert`, of one weight: for models whose integers should not all be in memory at once."""
    return _convert(model, name, quantized_weights(model)[name])


def _convert(model: nn.Module, name: str, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    weight = model.get_parameter(name)
    if not bool(torch.isfinite(weight).all()):
        raise QuantError(f"{name} holds NaN or infinite weights, which have no codes; use an earlier checkpoint")
    lanes = grouped_last(weight, spec) if weight.ndim == 3 else weight
    scales = group_scales(lanes, spec)
    return quantize(lanes, scales, spec), scales


def _on_grid(codes: Tensor, scales: Tensor, spec: QuantSpec) -> Tensor:
    """The weight, in its own layout, that these integers stand for."""
    weight = dequantize(codes, scales, spec)
    return grouped_last(weight, spec).contiguous() if weight.ndim == 3 else weight


def bake(model: nn.Module) -> dict[str, Tensor]:
    """State dict of a prepared model with the quantized weights on their grid, in fp32, and the rest as it is.

    A plain model with these weights computes what the prepared one does but for the rounding of activations. The
    grid's scales cannot be found again from these values (the largest code need not be reached): keep `convert`'s.
    """
    specs = quantized_weights(model)
    grid = {name: _on_grid(codes, scales, specs[name]) for name, (codes, scales) in convert(model).items()}
    return {name: grid.get(name, value.detach()) for name, value in model.state_dict().items()}


@torch.no_grad()
def freeze(model: nn.Module) -> nn.Module:
    """Put the weights of a prepared model on their grid for good: the same numbers, without rounding in each forward.

    Activations are rounded as before. For models that are only used from now on; they cannot be converted any more.
    """
    specs = quantized_weights(model)
    for name, (codes, scales) in convert(model).items():
        model.get_parameter(name).copy_(_on_grid(codes, scales, specs[name]))
    for module in model.modules():
        if isinstance(module, _FakeQuant):
            module.frozen = True
    return model
