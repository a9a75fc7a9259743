"""Latency from shape: a Gaussian process and a robust sum over analytic features, whichever predicts better.

One model is for one `Key` (device class, runtime, threads, metric, context) and one fidelity: readings of another are refused,
never mixed. Everything is fitted to the log of the value. `report()` says by cross-validation how far it may be trusted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modeling.config import ModelConfig
from search.devices.base import Fidelity
from search.latency.features import feature_table
from search.latency.gates import Report, make_report
from search.latency.gaussian import GaussianProcess
from search.latency.linear import fit_linear, predict_linear, robust_spread
from search.latency.part import Part
from search.latency.reading import MIN_READINGS, Key, Reading, check_readings, log_variances

Array = NDArray[np.float64]
KINDS = ("linear", "gp", "linear+gp")
"""A robust sum of features; a process over their logs; a process over what the sum leaves."""
TRANSFERRED = ("scale", "scale+gp")
"""Of a new device: an older model's prediction times one factor; a process over what that leaves."""
FOLDS = 5
NOUGHT = 0.01


class LatencyModel:
    """Made by `LatencyModel.fit`; `predict` gives mean and deviation in the metric's unit."""

    def __init__(self, key: Key, readings: Sequence[Reading], prior: LatencyModel | None = None) -> None:
        check_readings(key, readings)
        self.key, self.readings, self.prior = key, list(readings), prior
        self.fidelity: Fidelity = readings[0].fidelity
        self.kind = "linear"
        self.band = 1.0
        """What the deviations are multiplied by, so that 95 % bands hold 95 % of held-out readings."""
        self._configs = [reading.config for reading in readings]
        self._mixtures = any(config.moe is not None for config in self._configs)
        self._values = np.array([reading.value for reading in readings])
        self._features = self._table(self._configs)
        self._units = np.maximum(self._features.max(axis=0), 1e-12)
        self._errors = log_variances(readings)
        self._variances = self._errors
        self._parts: dict[str, Part] = {}

    @classmethod
    def fit(cls, key: Key, readings: Sequence[Reading], prior: LatencyModel | None = None) -> LatencyModel:
        """The kind with the smallest cross-validated error. Raises ValueError for too few, mixed or impossible readings."""
        model = cls(key, readings, prior)
        outliers = model._flag_outliers()
        kinds = KINDS if prior is None else TRANSFERRED + KINDS
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
        """Lower and upper end of the band that holds a reading (95 % by default), [configs] each; never below 0.

        Wider than the deviations of `predict`, which are of the true value: a reading has an error of its own.
        """
        part = self._parts[self.kind]
        mean, deviation = self._predict_log(self.kind, part, configs)
        half = deviations * self.band * _of_reading(part, deviation, np.full(len(configs), np.median(self._errors)))
        return np.exp(mean - half), np.exp(mean + half)

    def inputs(self, configs: Sequence[ModelConfig]) -> Array:
        """[configs, columns]: what a process sees: logs of each feature's share of the largest read.

        Nought stays finite, and not far off: a model may have no window layer.
        """
        return np.log(self._table(configs) / self._units + NOUGHT)

    def correlation(self, configs: Sequence[ModelConfig]) -> Array:
        """[configs, configs]: how far the errors of two predictions go together; the identity where that is unknown."""
        part = self._parts[self.kind]
        if part.process is None:
            return np.eye(len(configs))
        _, covariance = part.process.joint(self.inputs(configs))
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
        return feature_table(configs, self.key.metric, self.key.context, self.key.threads, mixtures=self._mixtures)

    def _flag_outliers(self) -> NDArray[np.bool_]:
        """Readings far off the robust sum get the variance of their distance: kept, but without weight.

        Few readings cannot bear out a sum of so many columns: then it is the older device's model they are held against.
        """
        few = len(self._values) < 3 * MIN_READINGS
        fitted = self.prior.predict(self._configs)[0] if self.prior is not None and few else predict_linear(
            self._features, fit_linear(self._features, self._values, self._variances), 0.1 * self._values.min())
        residual = np.log(self._values) - np.log(fitted)
        residual -= np.median(residual)
        flagged = np.abs(residual) > np.maximum(5 * robust_spread(residual), 0.05)
        self._variances = np.where(flagged, self._variances + residual**2, self._variances)
        return flagged

    def _fit_part(self, kind: str, points: NDArray[np.intp] | None = None, fitted: Part | None = None) -> Part:
        """On all readings or on `points`; with `fitted` its process parameters are taken over, not fitted anew."""
        points = np.arange(len(self._values)) if points is None else points
        features, values, variances = self._features[points], self._values[points], self._variances[points]
        part = Part(floor=0.1 * float(values.min()))
        if kind.startswith("linear"):
            part.weights = fit_linear(features, values, variances)
        left = np.log(values) - self._offset(kind, part, [self._configs[i] for i in points], features)
        part.shift = weighted_median(left, variances)
        part.spread = robust_spread(left)
        if kind.endswith("gp"):
            inputs, left = self.inputs([self._configs[i] for i in points]), left - part.shift
            previous = fitted.process if fitted is not None else None
            part.process = (GaussianProcess(inputs, left, variances) if previous is None
                            else previous.parameters_for(inputs, left, variances))  # fmt: skip
        return part

    def _offset(self, kind: str, part: Part, configs: Sequence[ModelConfig], features: Array) -> Array:
        """The log that a process is fitted around."""
        if kind.startswith("linear"):
            assert part.weights is not None
            return np.log(predict_linear(features, part.weights, part.floor))
        if kind.startswith("scale"):
            assert self.prior is not None
            return np.log(self.prior.predict(configs)[0])
        return np.zeros(len(configs))

    def _predict_log(self, kind: str, part: Part, configs: Sequence[ModelConfig]) -> tuple[Array, Array]:
        features = self._table(configs)
        mean = self._offset(kind, part, configs, features) + part.shift
        if part.process is None:
            return mean, np.full(len(configs), part.spread)
        more, deviation = part.process.predict(self.inputs(configs))
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
            deviation[held] = _of_reading(part, deviation[held], self._errors[held])
        return mean, deviation

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
            part = Part.load(state["part"])
            if (process := state["part"]["process"]) is not None:
                left = np.log(model._values) - model._offset(model.kind, part, model._configs, model._features) - part.shift
                part.process = GaussianProcess(model.inputs(model._configs), left, model._variances, process)
        except (KeyError, TypeError, RuntimeError) as error:
            raise ValueError(f"not the state of a latency model ({error}); fit it anew from the readings") from None
        model._parts = {model.kind: part}
        return model


def _of_reading(part: Part, deviation: Array, errors: Array) -> Array:
    """Deviation of a reading from that of the function; errors: variances of its log, [points].

    The spread of a sum was taken from readings, so their noise is in it already.
    """
    return deviation if part.process is None else np.sqrt(deviation**2 + errors + part.process.extra_noise)


def band_factor(distances: Array) -> float:
    """By how much to widen (or narrow) deviations so that 95 % of the distances, in deviations, lie within 1.96."""
    return float(np.clip(np.quantile(distances, 0.95) / 1.96, 0.5, 10))


def weighted_median(values: Array, variances: Array) -> float:
    order = np.argsort(values)
    share = np.cumsum(1 / variances[order])
    return float(values[order][np.searchsorted(share, share[-1] / 2)])
