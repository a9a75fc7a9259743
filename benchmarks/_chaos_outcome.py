"""What a sweep of benchmarks/search_chaos.py came to, and whether two came to the same."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from search.jobs import JobQueue, violations
from search.store import Store


def outcome(folder: Path, loop: str = "service") -> dict[str, Any]:
    """What must be equal, and what must not be."""
    from benchmarks._chaos_sweep import outcome as more

    with Store.read(folder / "search.sqlite") as store:
        queue = JobQueue(store)
        return {
            **(more(store) if loop == "sweep" else {}),
            "trials": [[trial.number, trial.key, trial.state, trial.results] for trial in store.trials()],
            "told": [trial.number for trial in store.told()],
            "violations": violations(queue),
            "open": len(queue.jobs("waiting", "running")) + len(store.trials("waiting", "running")),
            "late_answers": len(store.events("late_answer")), "put_back": len(store.events("put_back")),
            "jobs": len(queue.jobs()),
        }  # fmt: skip


def compare(calm: Mapping[str, Any], wild: Mapping[str, Any]) -> list[str]:
    """What is wrong with the disturbed sweep, in words."""
    wrong = [*wild["violations"], *([f"{wild['open']} open"] if wild["open"] else [])]
    pairs = zip(calm["trials"], wild["trials"], strict=False)
    wrong += [f"trial {quiet[0]}: {quiet} undisturbed, {other} disturbed" for quiet, other in pairs if quiet != other]
    if len(calm["trials"]) != len(wild["trials"]) or calm["told"] != wild["told"]:
        wrong.append("other trials, or told in another order")
    wrong += [f"{name}: {calm[name]} undisturbed, {wild.get(name)} disturbed" for name in ("front", "confirmed", "phase")
              if name in calm and calm[name] != wild.get(name)]  # fmt: skip
    return wrong
