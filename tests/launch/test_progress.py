"""What the progress bars read while a stage writes."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.progress import _Tail

ROW = '{"step": 3, "loss": 2.5, "tokens_per_second": 10, "stage": "sft"}\n'


@pytest.mark.parametrize(
    ("content", "step"),
    [(ROW, 3), (ROW + '{"step": 4, "lo', 3), ("", None), (ROW + "{torn}\n", None), (ROW + "[]\n", None),
     (ROW.replace("2.5", "null"), None)],
)  # fmt: skip
def test_the_newest_whole_line_is_shown_and_a_damaged_one_is_passed_over(
    content: str, step: int | None, tmp_path: Path
) -> None:
    path = tmp_path / "metrics.jsonl"
    assert _Tail(path).last() is None
    path.write_text(content)
    row = _Tail(path).last()
    assert (row and row["step"]) == step
