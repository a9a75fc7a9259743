"""Trials that check the model where it has not been: the next values of each size beside the front.

A model that is too sure of a value it has hardly tried never tries it, and one-step-ahead errors do not tell, for they are made
where it has been. So a share of every batch goes to values next to those of the front that were not asked for since there is a
model, each with the candidate that suits it best.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from search.optim.encode import Codes
from search.optim.hypervolume import improvements
from search.optim.pool import Pool, undominated, unique

Array = NDArray[np.float64]
Chance = Callable[[Codes], Array | None]
VISITS = 2
"""Trials that a value must have had."""
SHARES = (0.25, 0.125)
"""Of a batch, as long as a value was never tried; as long as one was tried less than `VISITS` times."""
OPTIMISM = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0)
"""Deviations to be tried, in turn, until a candidate would add to the front."""


def choose_probes(
    pool: Pool, score: Callable[[float, Codes], Array], trials: Codes, asked: Codes, closed: set[bytes], reference: Array,
    n: int, chance: Chance,
) -> Codes:
    """At most a share of `n` candidates, in the order of how little their value was tried.

    score(deviations, codes): objectives [candidates, objectives], so many deviations better than expected; trials: all that
    did not fail; asked: those that were chosen by the model, failed ones too; closed: what is not to be asked again;
    chance(codes): how likely their trials succeed, None where nothing is known of it.
    """
    values = score(0.0, trials)
    inside = (values < reference).all(axis=1)
    best = trials[inside][undominated(values[inside])] if inside.any() else trials[:0]
    wanted = _little_tried(pool, best, asked) if len(best) else []
    if not wanted:
        return best[:0]
    room = SHARES[0] * n if wanted[0][0] == 0 else SHARES[1] * n
    count = int(room) + int(pool.draw.random() < room - int(room))
    base = values[inside][None]
    found = [_best_with(pool, score, base, best, closed, reference, chance, column, value)
             for _, column, value in wanted[:count]]  # fmt: skip
    return unique(np.vstack([best[:0], *found]))


def _little_tried(pool: Pool, best: Codes, asked: Codes) -> list[tuple[int, int, int]]:
    """(trials so far, column, value), least tried first; of sizes the values next to those on the front, of categories all."""
    encoder, found = pool.encoder, []
    for column in [*encoder.numeric, *encoder.categories]:
        size, used = int(encoder.sizes[column]), best[:, column]
        near: Sequence[int] = range(size)
        if column in encoder.numeric:
            near = sorted({int(value) + step for value in used for step in (-1, 1) if 0 <= value + step < size})
        for value in near:
            visits = int((asked[:, column] == value).sum())
            if visits < VISITS:
                beside = float((np.abs(used - value) <= 1).mean())
                found.append((visits, -beside, float(pool.draw.random()), column, value))
    return [(visits, column, value) for visits, _, _, column, value in sorted(found)]


def _best_with(
    pool: Pool, score: Callable[[float, Codes], Array], base: Array, best: Codes, closed: set[bytes], reference: Array,
    chance: Chance, column: int, value: int,
) -> Codes:
    """[one or none, names]: what adds most to the front with the least optimism."""
    codes = best
    for _ in range(3):
        codes = unique(np.vstack([codes, pool.mutate(codes)]))
        codes[:, column] = value
        codes = pool.admit(codes)[:400] if len(codes) <= 400 else pool.admit(codes[pool.draw.permutation(len(codes))[:400]])
        codes = codes[codes[:, column] == value]  # repair may have changed it
    codes = codes[[code.tobytes() not in closed for code in codes]]
    likely = chance(codes) if len(codes) else None
    for deviations in OPTIMISM if len(codes) else ():
        gain = improvements(base, score(deviations, codes)[None], reference)[0]
        if gain.max() > 0:
            return codes[[int((gain if likely is None else gain * likely).argmax())]]
    return codes[:0]
