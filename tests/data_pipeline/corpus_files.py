"""Small corpora for the tests of this folder."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

WORDS = "the a model phone runs small token row pack learn answer loss step seven 42 x=1 naïve\u2028line".split(" ")


def sentences(count: int, seed: int) -> str:
    rng = random.Random(seed)
    return "".join(" ".join(rng.choices(WORDS, k=rng.randint(3, 12))) + ".\n" for _ in range(count))


def write_rows(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return file
