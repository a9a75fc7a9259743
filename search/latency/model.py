"""Latency from shape: a Gaussian process and a robust sum over analytic features, whichever predicts better.

One model is for one `Key` (device class, runtime, threads, metric, context) and one fidelity: readings of another are refused,
never mixed. Everything is fitted to the log of the value. `report()` says by cross-validation how far it may be trusted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modeling.config import ModelConfig
from search.devices.base import Fidelity
from search.latency.features import METRICS, UNITS, Metric, feature_table
from search.latency.gates import Report, make_report
from search.latency.gaussian import GaussianProcess
from search.latency.linear import fit_linear, predict_linear, robust_spread

Array = NDArray[np.float64]
KINDS = ("linear", "gp", "linear+gp")
"""A robust sum of features; a process over their logs; a process over what the sum leaves."""
TRANSFERRED = ("scale", "scale+gp")
"""Of a new device: an older model's prediction times one factor; a process over what that leaves."""
FOLDS = 5
MIN_READINGS = 10


@dataclass(frozen=True, kw_only=True)
class Key:
    """What one model is for."""

    device_class: str
    runtime: str
    threads: int
    metric: Metric
    context: int
    """Tokens of the prompt, or before the decoded one."""

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise ValueError(f"metric {self.metric!r} is unknown; expected one of {', '.join(METRICS)}")


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What was measured of one architecture."""

    config: ModelConfig
    value: float
    """Of the key's metric: ms, or MiB for peak_memory. A median of repeats."""
    std_error: float | None = None
    """Of that value, in its unit; None where it is not known."""
    fidelity: Fidelity


class LatencyModel:
    """Made by `LatencyModel.fit`; `predict` gives mean and deviation in the metric's unit."""

    def __init__(self, key: Key, readings: Sequence[Reading], prior: LatencyModel | None = None) -> None:
        _check(key, readings)
        self.key, self.readings, self.prior = key, list(readings), prior
        self.fidelity: Fidelity = readings[0].fidelity
        self.kind = "linear"
        self.band = 1.0
        """What the deviations are multiplied by, so that 95 % bands hold 95 % of held-out readings."""
        self._configs = [reading.config for reading in readings]
        self._values = np.array([reading.value for reading in readings])
        self._features = self._table(self._configs)
        self._variances = _log_variances(readings)
        self._parts: dict[str, _Part] = {}

    @classmethod
    def fit(cls, key: Key, readings: Sequence[Reading], prior: LatencyModel | None = None) -> LatencyModel:
        """The kind with the smallest cross-validated error. Raises ValueError for too few, mixed or impossible readings."""
        model = cls(key, readings, prior)
        outliers = model._flag_outliers()
        kinds = KINDS if prior is None else TRANSFERRED + (KINDS if len(readings) >= 3 * MIN_READINGS else ())
        errors = {}
        for kind in kinds:
            model._parts[kind] = model._fit_part(kind)
            mean, _ = model._cross_validate(kind)
            # Judged without the flagged readings: one slip of a device must not decide between models.
            errors[kind] = float(np.sqrt(np.mean((mean - np.log(model._values))[~outliers] ** 2)))
        model.kind = min(errors, key=lambda kind: errors[kind])
        model._calibrate()
        return model

    # --- use ---

    def predict(self, configs: Sequence[ModelConfig]) -> tuple[Array, Array]:
        """Mean and standard deviation, [configs] each, in ms (MiB for peak_memory)."""
        mean, deviation = self._predict_log(self.kind, self._parts[self.kind], configs)
        return np.exp(mean), np.exp(mean) * deviation * self.band

    def interval(self, configs: Sequence[ModelConfig], deviations: float = 1.96) -> tuple[Array, Array]:
        """Lower and upper end of the band (95 % by default), [configs] each; around the log, so never below 0."""
        mean, deviation = self._predict_log(self.kind, self._parts[self.kind], configs)
        half = deviations * deviation * self.band
        return np.exp(mean - half), np.exp(mean + half)

    def correlation(self, configs: Sequence[ModelConfig]) -> Array:
        """[configs, configs]: how far the errors of two predictions go together; the identity where that is unknown."""
        part = self._parts[self.kind]
        if part.process is None:
            return np.eye(len(configs))
        _, covariance = part.process.joint(_logs(self._table(configs)))
        deviation = np.sqrt(np.maximum(np.diag(covariance), 1e-12))
        return np.clip(covariance / deviation[:, None] / deviation[None, :], -1, 1)

    def report(self) -> Report:
        """The gates of use, cross-validated. Flagged readings count: a user meets them too."""
        mean, deviation = self._cross_validate(self.kind)
        return make_report(self.kind, np.log(self._values), mean, deviation, FOLDS)

    def held_out(self) -> tuple[Array, Array]:
        """What was read, and what the model says of each reading without its fold; [readings] each, in the metric's unit."""
        mean, _ = self._cross_validate(self.kind)
        return self._values.copy(), np.exp(mean)

    # --- fitting ---

    def _table(self, configs: Sequence[ModelConfig]) -> Array:
        return feature_table(configs, self.key.metric, self.key.context, self.key.threads)

    def _flag_outliers(self) -> NDArray[np.bool_]:
        """Readings far off the robust sum get the variance of their distance: kept, but without weight."""
        base = self.prior.predict(self._configs)[0] if self.prior is not None else None
        fitted = base if base is not None else predict_linear(
            self._features, fit_linear(self._features, self._values, self._variances), 0.1 * self._values.min())
        residual = np.log(self._values) - np.log(fitted)
        residual -= np.median(residual)
        flagged = np.abs(residual) > np.maximum(5 * robust_spread(residual), 0.05)
        self._variances = np.where(flagged, self._variances + residual**2, self._variances)
        return flagged

    def _fit_part(self, kind: str, points: NDArray[np.intp] | None = None, fitted: _Part | None = None) -> _Part:
        """On all readings or on `points`; with `fitted` its process parameters are taken over, not fitted anew."""
        points = np.arange(len(self._values)) if points is None else points
        features, values, variances = self._features[points], self._values[points], self._variances[points]
        part = _Part(floor=0.1 * float(values.min()))
        if kind.startswith("linear"):
            part.weights = fit_linear(features, values, variances)
        left = np.log(values) - self._offset(kind, part, [self._configs[i] for i in points], features)
        part.shift = _weighted_median(left, variances)
        part.spread = robust_spread(left)
        if kind.endswith("gp"):
            inputs, left = _logs(features), left - part.shift
            previous = fitted.process if fitted is not None else None
            part.process = (GaussianProcess(inputs, left, variances) if previous is None
                            else previous.parameters_for(inputs, left, variances))  # fmt: skip
        return part

    def _offset(self, kind: str, part: _Part, configs: Sequence[ModelConfig], features: Array) -> Array:
        """The log that a process is fitted around."""
        if kind.startswith("linear"):
            assert part.weights is not None
            return np.log(predict_linear(features, part.weights, part.floor))
        if kind.startswith("scale"):
            assert self.prior is not None
            return np.log(self.prior.predict(configs)[0])
        return np.zeros(len(configs))

    def _predict_log(self, kind: str, part: _Part, configs: Sequence[ModelConfig]) -> tuple[Array, Array]:
        features = self._table(configs)
        mean = self._offset(kind, part, configs, features) + part.shift
        if part.process is None:
            return mean, np.full(len(configs), part.spread)
        more, deviation = part.process.predict(_logs(features))
        return mean + more, deviation

    def _cross_validate(self, kind: str) -> tuple[Array, Array]:
        """Log mean and deviation of every reading from a model without its fold (noise of the reading included).

        Length scales are those of all readings; weights and everything conditioned on points are the fold's own.
        """
        order = np.random.default_rng(0).permutation(len(self._values))
        mean, deviation = np.empty(len(order)), np.empty(len(order))
        for fold in range(FOLDS):
            held = order[fold::FOLDS]
            part = self._fit_part(kind, np.setdiff1d(order, held), self._parts[kind])
            mean[held], deviation[held] = self._predict_log(kind, part, [self._configs[i] for i in held])
        # The spread of the sum was taken from readings, so their noise is in it already.
        return mean, np.sqrt(deviation**2 + (self._variances if kind.endswith("gp") else 0))

    def _calibrate(self) -> None:
        mean, deviation = self._cross_validate(self.kind)
        self.band = band_factor(np.abs(np.log(self._values) - mean) / deviation)

    # --- keeping ---

    def state(self) -> dict[str, Any]:
        """Plain values for JSON: the readings and what was fitted."""
        part = self._parts[self.kind]
        return {
            "key": asdict(self.key), "kind": self.kind, "band": self.band,
            "readings": [{**asdict(reading), "config": asdict(reading.config)} for reading in self.readings],
            "variances": self._variances.tolist(), "part": part.state(),
            "prior": self.prior.state() if self.prior is not None else None,
        }  # fmt: skip

    @classmethod
    def load(cls, state: dict[str, Any]) -> LatencyModel:
        """From `state()`. Raises ValueError where it is not one."""
        try:
            readings = [Reading(**{**item, "config": ModelConfig.from_plain(item["config"])}) for item in state["readings"]]
            prior = cls.load(state["prior"]) if state["prior"] else None
            model = cls(Key(**state["key"]), readings, prior)
            model.kind, model.band = state["kind"], float(state["band"])
            model._variances = np.array(state["variances"], dtype=np.float64)
            part = _Part.load(state["part"])
            if (process := state["part"]["process"]) is not None:
                left = np.log(model._values) - model._offset(model.kind, part, model._configs, model._features) - part.shift
                part.process = GaussianProcess(_logs(model._features), left, model._variances, process)
        except (KeyError, TypeError, RuntimeError) as error:
            raise ValueError(f"not the state of a latency model ({error}); fit it anew from the readings") from None
        model._parts = {model.kind: part}
        return model


@dataclass
class _Part:
    """What was fitted of one kind."""

    floor: float
    weights: Array | None = None
    shift: float = 0.0
    spread: float = 0.0
    process: GaussianProcess | None = None

    def state(self) -> dict[str, Any]:
        return {"floor": self.floor, "weights": None if self.weights is None else self.weights.tolist(),
                "shift": self.shift, "spread": self.spread,
                "process": None if self.process is None else self.process.state()}  # fmt: skip

    @classmethod
    def load(cls, state: dict[str, Any]) -> _Part:
        weights = None if state["weights"] is None else np.array(state["weights"], dtype=np.float64)
        return cls(float(state["floor"]), weights, float(state["shift"]), float(state["spread"]))


def band_factor(distances: Array) -> float:
    """By how much to widen (or narrow) deviations so that 95 % of the distances, in deviations, lie within 1.96."""
    return float(np.clip(np.quantile(distances, 0.95) / 1.96, 0.5, 10))


def _check(key: Key, readings: Sequence[Reading]) -> None:
    if len(readings) < MIN_READINGS:
        raise ValueError(f"{len(readings)} readings are too few for a latency model; measure at least {MIN_READINGS}")
    if len(fidelities := sorted({reading.fidelity for reading in readings})) > 1:
        raise ValueError(f"readings of fidelity {' and '.join(fidelities)} cannot be mixed; fit one model for each")
    if wrong := [reading.value for reading in readings if not (np.isfinite(reading.value) and reading.value > 0)]:
        raise ValueError(f"a reading of {key.metric} is {wrong[0]}; expected a value above 0 {UNITS[key.metric]}")


def _log_variances(readings: Sequence[Reading]) -> Array:
    """Of the log of each value; where no error is known the median of the others, or 2 %."""
    known = [None if reading.std_error is None else (reading.std_error / reading.value) ** 2 for reading in readings]
    given = [value for value in known if value is not None]
    usual = float(np.median(given)) if given else 0.02**2
    return np.maximum([usual if value is None else value for value in known], 1e-6)


def _logs(features: Array) -> Array:
    """Zero stays finite: a model may have no window layer."""
    return np.log(features + 1e-3)


def _weighted_median(values: Array, variances: Array) -> float:
    order = np.argsort(values)
    share = np.cumsum(1 / variances[order])
    return float(values[order][np.searchsorted(share, share[-1] / 2)])
