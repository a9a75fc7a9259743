"""Learning rates are pure functions of the step."""

from __future__ import annotations

import pytest

from stages.config import OptimConfig
from stages.schedule import learning_rate


def rates(steps: int, **options) -> list[float]:
    config = OptimConfig(lr=1.0, **options)
    return [learning_rate(config, step, steps) for step in range(1, steps + 1)]


def test_warm_up_is_linear_and_reaches_the_peak_at_its_last_step():
    assert rates(8, schedule="constant", warmup_steps=4) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
@pytest.mark.parametrize("floor", [0.0, 0.1])
def test_the_last_step_has_the_smallest_rate(schedule, floor):
    values = rates(20, schedule=schedule, warmup_steps=3, decay_steps=5, min_lr_ratio=floor)
    assert values[-1] == pytest.approx(floor)
    assert max(values) == values[2] == 1.0
    assert values[2:] == sorted(values[2:], reverse=True)


def test_cosine_is_half_way_down_in_the_middle():
    assert rates(10, schedule="cosine", min_lr_ratio=0.2)[4] == pytest.approx(0.6)


def test_wsd_is_stable_until_its_decay():
    values = rates(10, schedule="wsd", decay_steps=4)
    assert values[:6] == [1.0] * 6
    assert values[6:] == pytest.approx([0.75, 0.5, 0.25, 0.0])


def test_warm_up_longer_than_the_stage_never_divides_by_zero():
    for schedule in ("cosine", "linear", "wsd", "constant"):
        assert rates(2, schedule=schedule, warmup_steps=4, decay_steps=2) == [0.25, 0.5]
        assert rates(1, schedule=schedule)[0] >= 0.0
