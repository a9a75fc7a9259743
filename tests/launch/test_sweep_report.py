"""A search's page, table and record: what they say, what they refuse to say, and that nothing gets out or in."""

from __future__ import annotations

import re
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from launch.sweep_collect import from_store, front_of, hypervolumes
from launch.sweep_data import FrontPoint, Limit, Objective, SweepRecord, TrialRecord
from launch.sweep_drawings import drawing, spoken
from launch.sweep_live import live_table
from launch.sweep_report import render_sweep, spread, write_sweep_report
from launch.sweep_text import interval, quantity, verdict
from modeling.config import ModelConfig
from search.records import DeviceRecord, Reading
from search.store import Store
from tests.helpers.page import Page
from tests.helpers.sweep_records import (
    DECODE,
    FOUR_SECONDS,
    LOSS,
    TTFT,
    demo_record,
    demo_space,
    demo_trials,
    true_values,
)

HOSTILE = "<script>alert('x')</script><img src=\"http://evil.example/x.png\"> & \x00\u202e [red]done[/red]"
MODEL = ModelConfig(vocab_size=512, hidden_size=64, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=16, ffn_size=192,
                    attention=("full", "skip", "window"))  # fmt: skip


@pytest.fixture(scope="module")
def record() -> SweepRecord:
    return demo_record(60)


@pytest.fixture(scope="module")
def raw(record: SweepRecord) -> str:
    return render_sweep(record)


def trial(number: int, loss: float, ttft: float, **more: object) -> TrialRecord:
    fields = {"state": "ok", "config": asdict(MODEL), "results": {"loss": loss, "ttft_ms": ttft}, "fidelity": "device", **more}
    return TrialRecord(number=number, key=str(number), **fields)  # type: ignore[arg-type]


def small(*trials: TrialRecord, limits: tuple[Limit, ...] = (FOUR_SECONDS,), **more: object) -> SweepRecord:
    made = SweepRecord(name="small", objectives=(LOSS, TTFT), limits=limits, fidelity="device", trials=trials, **more)  # type: ignore[arg-type]
    return replace(made, front=front_of(made), hypervolume=hypervolumes(made))


def test_the_page_shows_every_judged_trial_once_and_the_front_as_such(record: SweepRecord, raw: str) -> None:
    page = Page(raw)
    hits = [attributes for _, attributes in page.tags if (attributes.get("class") or "").startswith("hit")]
    assert len(hits) == len(record.judged()) > 40
    assert sum("front" in (hit["class"] or "") for hit in hits) == len(record.front) > 3
    for hit in hits:
        places = re.findall(r"([\d.]+)%", hit["style"] or "")
        assert all(0 < float(place) < 100 for place in places), hit
    assert raw.count("on the front</span>") == len(record.front) + 1  # and the legend


def test_a_hit_lies_where_its_point_is_drawn() -> None:
    raw = render_sweep(small(trial(0, 2.5, 1000), trial(1, 2.4, 2000), trial(2, 2.3, 3000)))
    places = [(float(a), float(b)) for a, b in re.findall(r"left:([\d.]+)%;top:([\d.]+)%", raw)]
    assert places == sorted(places), "a slower model lies to the right, a better one lower"
    chart = raw[raw.index("<svg viewBox", raw.index('class="plot"')) :]
    width, height = map(float, re.findall(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', chart)[0])
    drawn = {(round(100 * float(x) / width, 1), round(100 * float(y) / height, 1))
             for x, y in re.findall(r'<use xlink:href="#[^"]+" x="([\d.]+)" y="([\d.]+)"', chart)}  # fmt: skip
    assert all(any(abs(a - x) < 0.2 and abs(b - y) < 0.2 for x, y in drawn) for a, b in places), (places, drawn)


def test_the_table_of_the_front_has_what_was_measured_predicted_and_how_large_it_is(record: SweepRecord, raw: str) -> None:
    page = Page(raw)
    for point in record.front:
        found = record.trials[point.trial]
        model = found.model()
        assert model is not None and found.results is not None
        assert quantity(found.results["ttft_ms"], TTFT) in page.text
        assert interval(point.intervals["ttft_ms"], TTFT) in page.text
        assert quantity(found.predicted["ttft_ms"], TTFT) in page.text
        assert f"{model.weight_bytes(4, 32) / 2**20:.4g} MiB" in page.text
    assert page.text.count("✓") >= sum(point.confirmed for point in record.front)


def test_nothing_is_fetched_and_no_script_is_there(raw: str) -> None:
    page = Page(raw)
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "img", "object", "embed", "base"}
    for _, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")]
        for key in ("src", "href", "xlink:href", "srcset", "data", "action"):
            assert (attributes.get(key) or "#").startswith("#"), attributes
    assert "url(" not in re.sub(r"url\(#[^)]*\)", "", raw) and "@import" not in raw
    policy = next(attributes for _, attributes in page.tags if attributes.get("http-equiv"))
    assert (policy["content"] or "").startswith("default-src 'none'")


def test_references_inside_the_page_lead_somewhere_and_ids_are_unique(raw: str) -> None:
    ids = re.findall(r'\bid="([^"]+)"', raw)
    assert len(ids) == len(set(ids))
    wanted = set(re.findall(r'url\(#([^)]+)\)|xlink:href="#([^"]+)"', raw))
    assert {a or b for a, b in wanted} <= set(ids)
    assert not re.search(r"#(0[1-9a-c])\1\1\b", raw), "a stand-in colour was left in"


def test_the_same_record_gives_the_same_page(record: SweepRecord, raw: str) -> None:
    assert render_sweep(SweepRecord.from_json(record.to_json())) == raw


def test_text_from_outside_is_shown_as_text(record: SweepRecord) -> None:
    first = record.devices[0]
    hostile = replace(
        record, name=HOSTILE, phase=HOSTILE, notes=(HOSTILE,), events={HOSTILE: 1},
        objectives=(replace(LOSS, label=HOSTILE), TTFT),
        devices=(replace(first, name=HOSTILE, reason=HOSTILE, state=HOSTILE, failures={HOSTILE: 1}),),
        trials=(*record.trials, TrialRecord(number=900, state="failed", reason=HOSTILE)),
        picks=(replace(record.picks[0], path=HOSTILE, why=HOSTILE),),
    )  # fmt: skip
    raw = render_sweep(hostile)
    page = Page(raw)
    assert not {tag for tag, _ in page.tags} & {"script", "img"}
    assert "\x00" not in raw and "\u202e" not in raw
    assert page.text.count("alert('x')") > 8


def test_the_page_is_written_whole_and_leaves_nothing_beside_it(tmp_path: Path, record: SweepRecord) -> None:
    path = write_sweep_report(record, tmp_path / "report.html")
    assert path.read_text(encoding="utf-8").endswith("</html>")
    assert [item.name for item in tmp_path.iterdir()] == ["report.html"]


def test_a_search_without_trials_says_so_everywhere() -> None:
    empty = SweepRecord(name="new", objectives=(LOSS, TTFT))
    text = Page(render_sweep(empty)).text
    for words in ("No model has been tried yet.", "nothing to plot", "There is no front yet",
                  "No latency model has been fitted.", "No trial has ended.", "No model was exported.", "no trial was made",
                  "No device has taken part."):  # fmt: skip
        assert words in text
    assert verdict(empty).tone == "none"


def test_one_trial_is_a_front_of_one() -> None:
    one = small(trial(0, 2.5, 1000))
    assert one.front == (FrontPoint(trial=0),)
    text = Page(render_sweep(one)).text
    assert "1 of 1 model keeps time to first token ≤ 4 s; the best has held-out loss 2.5." in text


def test_when_all_failed_the_most_frequent_reason_is_told() -> None:
    failed = small(*(TrialRecord(number=i, config=asdict(MODEL), state="failed" if i else "infeasible",
                                 reason="lost: no answer" if i else "oom: killed") for i in range(4)))  # fmt: skip
    said = verdict(failed)
    assert said.headline == "None of the 4 models tried could be judged." and said.tone == "bad"
    assert "3 failed, 1 infeasible" in said.detail and "3 times: lost: no answer" in said.detail
    text = Page(render_sweep(failed)).text
    assert "1, 2, 3" in text and "There is no front" in text


def test_when_no_model_keeps_the_limit_the_closest_is_told_and_there_is_no_front() -> None:
    slow = small(trial(0, 2.5, 9000), trial(1, 2.4, 5100))
    assert slow.front == () and slow.hypervolume == (0.0, 0.0)
    said = verdict(slow)
    assert said.headline == "None of the 2 judged models keeps time to first token ≤ 4 s."
    assert said.detail == "The closest has 5.1 s of time to first token." and said.tone == "bad"
    assert "no judged trial keeps every limit" in Page(render_sweep(slow)).text


def test_trials_under_way_are_no_failure() -> None:
    assert verdict(small(trial(0, 0, 0, state="running", results=None))).tone == "none"


def test_the_price_of_the_limit_is_told() -> None:
    said = verdict(small(trial(0, 2.2, 3000), trial(1, 2.0, 8000), trial(2, 2.5, 1000)))
    assert said.headline == "2 of 3 models keep time to first token ≤ 4 s; the best has held-out loss 2.2."
    assert "Without it the best is trial 1 with 2: the limit costs 10.0 %." in said.detail


def test_front_and_hypervolume_are_of_what_keeps_the_limits() -> None:
    made = small(trial(0, 2.4, 3000), trial(1, 2.0, 9000), trial(2, 2.5, 3500), trial(3, 2.2, 3900),
                 trial(4, 2.4, 3000, duplicate_of=0), trial(5, 1.0, 1.0, fidelity="host"))  # fmt: skip
    assert [point.trial for point in made.front] == [0, 3]
    first = (2.65 - 2.4) * (5000 - 3000)
    assert made.hypervolume == pytest.approx((first, first, first, first + 0.2 * 1100, first + 0.2 * 1100, first + 0.2 * 1100))
    assert "1 trials have numbers of fidelity host" in Page(render_sweep(made)).text


def test_a_rate_is_maximised() -> None:
    goals = (Objective(name="loss", reference=3.0), DECODE)
    rows = [trial(i, loss, 0, results={"loss": loss, "decode_tok_s": rate})
            for i, (loss, rate) in enumerate([(2.5, 20.0), (2.4, 15.0), (2.6, 12.0), (2.7, 40.0)])]  # fmt: skip
    made = SweepRecord(name="rate", objectives=goals, fidelity="device", trials=tuple(rows))
    assert [point.trial for point in front_of(made)] == [0, 1, 3]
    assert hypervolumes(made)[-1] == pytest.approx(0.6 * 5 + 0.5 * 5 + 0.3 * 20)


@pytest.mark.parametrize(("objectives", "charts"), [((LOSS,), 1), ((LOSS, TTFT, DECODE), 3)])
def test_one_and_three_objectives_have_their_charts(objectives: tuple[Objective, ...], charts: int) -> None:
    trials = tuple(demo_trials(12))
    made = SweepRecord(name="many", objectives=objectives, limits=(FOUR_SECONDS,), fidelity="device", trials=trials)
    made = replace(made, front=front_of(made))
    page = Page(render_sweep(made))
    assert sum(attributes.get("class") == "plot" for _, attributes in page.tags) == charts
    assert "time to first token" in page.text  # an objective or only limited: the table has it


def test_a_point_far_beyond_the_reference_does_not_squeeze_the_chart() -> None:
    text = Page(render_sweep(small(trial(0, 2.5, 1000), trial(1, 2.4, 2000), trial(2, 2.3, 5e6)))).text
    assert "1 trial lies outside the axes" in text


def test_a_config_that_is_no_models_does_not_stop_the_page() -> None:
    text = Page(render_sweep(small(trial(0, 2.5, 1000, config={"num_layers": "many"}), trial(1, 2.4, 2000)))).text
    assert "its stored config is no model's" in text and "1 trials have a stored config that is no model's." in text


def test_a_drawing_has_a_bar_a_layer_in_its_kinds_fill_and_widths_to_scale() -> None:
    model = replace(MODEL, block_repeat=2)
    svg = drawing(model, 192, "Trial <7>")
    paths = dict(re.findall(r'<path class="(\w+)" d="([^"]+)"', svg))
    bars = {name: path.count("z") for name, path in paths.items()}
    assert bars == {"full": 2, "skip": 2, "window": 2, "ffn": 6, "bracket": 0}
    width = {name: float(re.findall(r"h([\d.]+)v", paths[name])[0]) for name in ("full", "ffn")}
    assert width["ffn"] / width["full"] == pytest.approx(192 / 64, abs=0.02)
    assert svg.count("×2") == model.num_layers and "Trial &lt;7&gt;" in svg
    assert spoken(model).endswith("1 with full attention, 1 with no attention, 1 with a window of 512; "
                                  "each stored layer runs 2 times")  # fmt: skip


def test_a_long_front_is_drawn_in_part_and_its_ends_are_among_them() -> None:
    points = [FrontPoint(trial=i) for i in range(40)]
    drawn = spread(points, 12)
    assert len(drawn) == len({point.trial for point in drawn}) == 12 and (drawn[0], drawn[-1]) == (points[0], points[-1])


def test_gates_and_proxies_stand_beside_each_other(raw: str) -> None:
    text = Page(raw).text
    assert "✗ not good enough" in text and "88 ✗" in text and "0.984 ✓" in text
    assert "parameters" in text and "0.62" in text and "Kendall 0.79, Spearman 0.92" in text


@pytest.mark.parametrize(("value", "metric", "words"), [
    (3421.0, TTFT, "3.421 s"), (312.0, TTFT, "312 ms"), (2.4134, LOSS, "2.413"), (None, LOSS, "–"), (float("nan"), TTFT, "–"),
    (3 * 2**29, Objective(name="b", unit="bytes", reference=0), "1.5 GiB"), (12345.0, DECODE, "12,345 tokens/s"),
])  # fmt: skip
def test_quantities_read_well(value: float | None, metric: Objective, words: str) -> None:
    assert quantity(value, metric) == words


def shown(record: SweepRecord) -> str:
    from io import StringIO

    from rich.console import Console

    console = Console(file=StringIO(), width=150, force_terminal=False)
    console.print(live_table(record))
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_the_live_table_tells_how_it_stands(record: SweepRecord) -> None:
    text = shown(record)
    for words in ("phone-night", "keep time to first token ≤ 4 s", " ok, ", "quarantined", "2.6 % off, Kendall 0.934", "+9.1 %",
                  "best within the limits"):  # fmt: skip
        assert words in text, words


def test_the_live_table_works_from_the_first_moment_on_and_obeys_no_markup() -> None:
    assert "none yet" in shown(SweepRecord(name="new", objectives=(LOSS, TTFT)))
    assert "[red]done[/red]" in shown(SweepRecord(name="new [red]done[/red]", objectives=(LOSS,)))
    assert "8 layers" not in shown(small(trial(0, 2.5, 9000, config={})))


def test_looking_at_a_search_loads_neither_torch_nor_an_optimizer() -> None:
    import subprocess
    import sys

    code = ("import sys, launch.sweep_live, launch.sweep_report, launch.sweep_run\n"
            "print(*sys.modules.keys() & {'torch', 'scipy.stats', 'botorch', 'wandb', 'ray'})")  # fmt: skip
    root = Path(__file__).resolve().parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True).stdout == "\n"


def test_a_record_needs_an_objective_and_json_must_be_one() -> None:
    with pytest.raises(ValueError, match="needs at least one objective"):
        SweepRecord(name="x", objectives=())
    with pytest.raises(ValueError):
        SweepRecord.from_json('{"name": "x"}')


def test_the_database_gives_trials_front_devices_and_events(tmp_path: Path) -> None:
    with Store.open(tmp_path / "sweep.db", {"space": "demo"}, clock=lambda: 1000.0) as store:
        fill(store)
    with Store.read(tmp_path / "sweep.db") as store:
        found = from_store(store, name="demo", objectives=(LOSS, TTFT), limits=(FOUR_SECONDS,), space_size=5,
                           predicted={0: {"ttft_ms": 2100.0}})  # fmt: skip
    assert [item.state for item in found.trials] == ["ok", "ok", "infeasible", "ok", "waiting"]
    assert found.fidelity == "device" and found.trials[3].duplicate_of == 0
    assert found.front == (FrontPoint(trial=0, intervals={"ttft_ms": (2000 - 19.6, 2000 + 19.6)}),
                           FrontPoint(trial=1, intervals={"ttft_ms": (1000 - 19.6, 1000 + 19.6)}))  # fmt: skip
    later, both = 0.05 * 4000, 0.05 * 4000 + 0.2 * 3000
    assert found.hypervolume == pytest.approx((later, both, both, both)), "in the order of the answers: trial 1 before trial 0"
    phone, spare = found.devices
    assert (phone.measured, phone.failures, phone.drift, phone.quarantines) == (2, {"crashed": 1}, (0.0, 0.07), 1)
    assert phone.utilisation == pytest.approx(0.6) and spare.utilisation == 0.0
    assert found.events["sentinel"] == 2 and found.trials[0].model() == MODEL
    assert "2 of 2 models keep" in Page(render_sweep(found)).text


def fill(store: Store) -> None:
    """Two good trials, a crash, a duplicate, one that waits; told in another order than they are numbered."""
    from search.jobs import JobQueue

    queue, config = JobQueue(store), asdict(MODEL)
    for name in ("phone", "spare"):
        store.put_device(DeviceRecord(name=name, device_class="p", fidelity="device"))
    store.add_trials([(key, config) for key in ("a", "b", "c", "a", "d")])
    for number, (loss, ttft) in enumerate(((2.4, 2000.0), (2.6, 1000.0))):
        job = queue.submit(f"t{number}", {}, trial=number, device_class="p")
        lease = queue.lease("phone", "p", 60)
        assert lease is not None and lease.job.id == job
        reading = Reading(device="phone", fidelity="device", status="ok", values={"ttft_ms": ttft}, errors={}, samples=[],
                          started=100.0 + 70 * number, ended=130.0 + 70 * number)  # fmt: skip
        assert queue.finish(lease, "ok", {"ttft_ms": ttft}, readings=[(reading, "result")])
        store.finish_trial(number, "ok", {"loss": loss, "ttft_ms": ttft, "odd": float("nan")}, {"ttft_ms": 10.0})
    store.finish_trial(2, "infeasible", reason="crashed: signal 11")
    store.settle_duplicates()
    for number in (1, 0, 2, 3):
        store.tell(number)
    for off in (0.0, 0.07):
        store.event("sentinel", device="phone", off=off)
    store.event("crashed", device="phone", trial=2)
    store.event("quarantined", device="phone")


def test_predictions_stand_for_what_was_not_measured_and_say_so(tmp_path: Path) -> None:
    with Store.open(tmp_path / "sweep.db", {}) as store:
        store.add_trials([(key, {"flat": 1}) for key in "abc"])
        store.finish_trial(0, "ok", {"loss": 2.4, "predicted_ttft_ms": 2000.0}, {"predicted_ttft_ms": 30.0})
        store.finish_trial(1, "ok", {"loss": 2.3, "predicted_ttft_ms": 3000.0, "ttft_ms": 3100.0}, {"ttft_ms": 9.0})
        store.finish_trial(2, "failed", reason="nan")
        store.event("confirmed", trial=1, losses=[2.3, 2.31], ttft_ms=[3100.0, None], reason="hot")
        for r2 in (0.9, 0.98):
            store.event("latency_model", bought=60,
                        report={"kind": "gp", "readings": 60, "r2": r2, "mape": 3.0, "passed": r2 > 0.95})  # fmt: skip
        found = from_store(store, name="demo", objectives=(LOSS, TTFT), limits=(FOUR_SECONDS,), to_model=lambda flat: MODEL)
    first, second = found.front
    assert first == FrontPoint(trial=0)
    assert (second.again, second.confirmed, second.reason) == ({"loss": 2.31}, True, "hot")
    assert second.intervals["ttft_ms"] == (3100 - 17.64, 3100 + 17.64), "as it was: there is no second time"
    assert second.intervals["loss"] == pytest.approx((2.305 - 12.706 * 0.005, 2.305 + 12.706 * 0.005), abs=1e-4)
    (report,) = found.latency
    assert (report.model.name, report.model.r2, report.passed, report.pairs, report.proxies) == ("gp", 0.98, True, (), ())
    assert [(miss.trial, miss.measured, miss.predicted) for miss in found.tried("ttft_ms")] == [(1, 3100.0, 3000.0)]
    text = Page(render_sweep(found)).text
    assert "Of 1 of the 2 this is predicted, not measured." in text and "on the front by a prediction" in text
    assert "time to first token (predicted) 2 s" in text and "again 2.31" in text and "-3.2 %" in text
    assert "made by an older version" in text and "Trial 1 was not confirmed in everything: hot" in text
    assert "~2 s" in shown(found) and "1 trial: median 3.2 % off, worst -3.2 % (trial 1)" in shown(found)


def test_every_number_of_a_device_has_its_newest_report_and_those_not_searched_by_come_last(tmp_path: Path) -> None:
    fits = (("peak_memory_mib", 0.5), ("ttft_ms", 9.0), ("ttft_ms", 2.5), ("decode_ms@512x2", 7.5), ("joules", 1.0))
    with Store.open(tmp_path / "sweep.db", {}) as store:
        for name, mape in fits:
            report = {"kind": "gp", "readings": 40, "mape": mape, "passed": True}
            store.event("latency_model", metric=name, bought=40, report=report)
        found = from_store(store, name="demo", objectives=(LOSS, TTFT), limits=(FOUR_SECONDS,))
    reports = [(report.metric.words, report.model.mape) for report in found.latency]
    decode = "time of a decoded token at 512 tokens, 2 threads"
    assert reports == [("time to first token", 2.5), (decode, 7.5), ("peak memory", 0.5)]
    text = Page(render_sweep(found)).text
    assert "also measured, not searched by" in text and f"{decode} ✓ usable 40 – 7.5 –" in text
    assert "model of time to first token" in shown(found) and "model of peak memory" not in shown(found)


def test_a_fitted_latency_model_brings_its_pairs_gates_and_proxies(tmp_path: Path) -> None:
    import random

    from search.latency.evidence import evidence
    from search.latency.model import LatencyModel
    from search.latency.reading import Key
    from search.latency.reading import Reading as LatencyReading

    space = demo_space()
    models = [space.to_config(candidate) for candidate in space.sample(random.Random(5), 12)]
    key = Key(device_class="p", runtime="r", threads=1, metric="ttft", context=1024)
    readings = [LatencyReading(config=model, value=true_values(model)["ttft_ms"], fidelity="analytic") for model in models]
    fitted = LatencyModel.fit(key, readings)
    with Store.open(tmp_path / "sweep.db", {}) as store:
        store.event("latency_model", bought=12, report=fitted.report().to_dict(), **evidence(fitted))
        (report,) = from_store(store, name="demo", objectives=(LOSS, TTFT)).latency
        size = len(store.rows("SELECT detail FROM events")[0]["detail"])
    assert size < 1500, "a fit of 400 readings must stay small"
    assert len(report.pairs) == report.readings == 12
    measured, predicted = np.array(report.pairs).T
    assert np.allclose(measured, [reading.value for reading in readings], rtol=1e-4)
    assert 100 * np.mean(np.abs(predicted / measured - 1)) == pytest.approx(report.model.mape, abs=0.01)
    assert [gate.name for gate in report.gates] == ["r2", "mape", "within_10", "spearman", "coverage"]
    assert report.passed == all(gate.passed for gate in report.gates)
    assert {proxy.name for proxy in report.proxies} == {"parameters", "flops"}
    assert all(0.5 < (proxy.kendall or 0) <= 1 for proxy in report.proxies)
    raw = render_sweep(SweepRecord(name="x", objectives=(LOSS, TTFT), latency=(report,)))
    near = int(np.sum(np.abs(predicted / measured - 1) <= 0.1))
    assert f"predicted against measured time to first token: {near} of 12 held-out readings within 10 %" in raw
    assert "parameters flops" in Page(raw).text
