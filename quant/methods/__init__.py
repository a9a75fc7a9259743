"""One file a method: forward, gradient, citation. `QuantSpec.method` picks one by name."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from quant.methods import minmax
from quant.spec import QuantSpec

WEIGHT_METHODS: dict[str, Callable[[Tensor, QuantSpec], Tensor]] = {"minmax": minmax.fake_quantize_weight}
