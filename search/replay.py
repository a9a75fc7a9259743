"""Does an optimizer, given a sweep's answers once more, ask what was asked?

The database's events say what happened in which order: `asked` (how many were wanted, which trials came of it, which readings
the latency model knew) and `told` (what the optimizer was given, corrections included). They are walked through from the start.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from search.readings import KnownReadings
from search.records import Event, Results, Trial
from search.space import Space
from search.store import Store

if TYPE_CHECKING:
    from search.latency.model import LatencyModel


class Forecast:
    """What the optimizer takes for known of a device: models of the readings that there are, or were at some time."""

    def __init__(self, readings: KnownReadings, needed: Iterable[str]) -> None:
        """needed: names of the device's numbers (search/metrics.py)."""
        self.readings, self.space = readings, readings.space
        self.metrics = {name: readings.metric(name) for name in needed}
        self.models: dict[str, LatencyModel] = {}
        self.jobs: list[int] = []
        """Whose readings it was fitted on."""

    def refit(self, jobs: Sequence[int] | None = None) -> None:
        """On the readings of these jobs, or on all that count now; nothing is done where the models know just those."""
        wanted = self.readings.counting() if jobs is None else list(jobs)
        if not self.models or wanted != self.jobs:
            self.models = {name: self.readings.fit(metric, wanted) for name, metric in self.metrics.items()}
            self.jobs = wanted

    def predict(self, name: str, flats: Sequence[Mapping[str, Any]]) -> tuple[Any, Any]:
        """Means and deviations of candidates in flat form, in the metric's unit."""
        return self.models[name].predict([self.space.to_config(self.space.unflatten(flat)) for flat in flats])


def note_asked(store: Store, forecast: Forecast, planned: int, made: Sequence[Trial], wanted: int) -> None:
    """An event of a question: with it and the answers the question can be asked again. `planned`: trials of the whole plan."""
    store.event("asked", wanted=wanted, planned=planned, trials=[trial.number for trial in made],
                readings=list(_ranges(forecast.jobs)))  # fmt: skip


def _ranges(numbers: Sequence[int]) -> Iterator[list[int]]:
    """First and last of each run of consecutive numbers."""
    start = 0
    for i in range(1, len(numbers) + 1):
        if i == len(numbers) or numbers[i] != numbers[i - 1] + 1:
            yield [numbers[start], numbers[i - 1]]
            start = i


@dataclass(frozen=True)
class Difference:
    """The first candidate that is another one."""

    trial: int
    asked: str
    """Key, as all here; none where the optimizer asked for fewer."""
    replayed: str

    def __str__(self) -> str:
        return f"trial {self.trial}: asked {self.asked}, replayed {self.replayed}"


@dataclass
class Replayed:
    """How far a replay went."""

    questions: int = 0
    trials: int = 0
    answers: int = 0
    difference: Difference | None = None
    tokens: dict[int, Any] = field(default_factory=dict)
    """By trial: what the replayed optimizer calls it."""


MakeReplayed = Callable[[int, Callable[..., Any]], Any]
"""(trials planned, what is known of the device) -> an optimizer of search/optim."""
Answer = Callable[[Results | None, Results], tuple[Results | None, Results]]
"""A trial's results and noise as the optimizer is told of them."""


def replay(store: Store, readings: KnownReadings, needed: Iterable[str], make: MakeReplayed, answer: Answer) -> Replayed:
    """Ask and tell a new optimizer as the events say, up to the first difference. `needed`: numbers that it knows.

    Raises ValueError for a database without such events, or one whose events do not hold all trials.
    """
    events = [event for event in store.events() if event.kind in ("asked", "told")]
    trials = {trial.number: trial for trial in store.trials()}
    noted = sum(len(event.detail["trials"]) for event in events if event.kind == "asked")
    if noted != len(trials):
        raise ValueError(f"{store.path} says of {noted} of its {len(trials)} trials how they were asked for; expected all: it "
                         "was made by a version that kept no such record, and cannot be replayed")  # fmt: skip
    forecast, found = Forecast(readings, needed), Replayed()
    optimizer, planned = None, 0
    for event in events:
        if event.kind == "told":
            assert optimizer is not None and event.trial is not None
            optimizer.tell(found.tokens[event.trial], *answer(event.detail["results"], event.detail["noise"]))
            found.answers += 1
            continue
        forecast.refit([job for first, last in event.detail["readings"] for job in range(first, last + 1)])
        if optimizer is None or event.detail["planned"] != planned:  # a sweep that was resumed with more trials
            state = None if optimizer is None else optimizer.state()
            planned = event.detail["planned"]
            optimizer = make(planned, forecast.predict)
            if state is not None:
                optimizer.load(state)
        found.difference = _ask(optimizer, readings.space, event, trials, found)
        if found.difference is not None:
            break
    return found


def _ask(optimizer: Any, space: Space, event: Event, trials: Mapping[int, Trial], found: Replayed) -> Difference | None:
    asked = optimizer.ask(event.detail["wanted"])
    found.questions += 1
    for place, number in enumerate(event.detail["trials"]):
        key = space.key(space.unflatten(asked[place][1])) if place < len(asked) else "none"
        if key != trials[number].key:
            return Difference(number, trials[number].key, key)
        found.tokens[number] = asked[place][0]
        found.trials += 1
    if more := asked[len(event.detail["trials"]):]:
        return Difference(found.trials, "none", space.key(space.unflatten(more[0][1])))
    return None
