"""Modelled devices: against the published rows of their profiles, and as a user meets them."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from kernels.packed_file import PackedFileError, f32, write_packed
from search.devices import MeasureRequest, open_device
from search.devices.base import REQUIRED
from search.devices.modelled import PROFILES, Shape, load_profile, operation_times
from stages.export_packed import model_metadata
from tests.helpers.packed_models import CONFIGS, packed

# The published models of the profiles' rows; their output layers are INT8 where the name says so.
MODELS = {
    "llama_3_2_1b_int8_head": Shape(2048, 2048, 512, 8192, 128_256, (None,) * 16, 1.0),
    "llama_3_2_3b_int8_head": Shape(3072, 3072, 1024, 8192, 128_256, (None,) * 28, 1.0),
    "llama_2_7b_int4": Shape(4096, 4096, 4096, 11_008, 32_000, (None,) * 32, 0.5625),
}
NAMES = sorted(path.stem for path in PROFILES.glob("*.json"))


@pytest.mark.parametrize("name", NAMES)
def test_a_profile_meets_what_it_was_calibrated_on_and_what_was_kept_aside(name):
    profile, document = load_profile(name), json.loads((PROFILES / f"{name}.json").read_text())
    assert profile.name == name and document["calibrated_on"]
    for rows, tolerance in ((document["calibrated_on"], 0.05), (document["held_out"], 0.10)):
        for row in rows:
            shape, prompt, threads = MODELS[row["model"]], row["prompt_tokens"], row["threads"]
            first = operation_times(shape, profile, tokens=prompt, past=0, threads=threads, kv="f16")
            step = operation_times(shape, profile, tokens=1, past=prompt + 16, threads=threads, kv="f16")
            if "prefill_tokens_per_second" in row:
                assert prompt / sum(first.values()) == pytest.approx(row["prefill_tokens_per_second"], rel=tolerance)
            assert 1 / sum(step.values()) == pytest.approx(row["decode_tokens_per_second"], rel=tolerance)


def test_the_model_answers_like_a_device_and_says_that_it_is_none(tmp_path):
    path = packed(CONFIGS["flash"], tmp_path)[1]
    found = open_device("model:oneplus_12").measure(MeasureRequest(model=path, prompt_tokens=32, decode_tokens=8))
    assert set(REQUIRED) <= found.keys()
    assert found["fidelity"] == "analytic" and found["samples"] == {} and "modelled" in found["note"]
    assert sum(found["operations"]["prefill_ms"].values()) == pytest.approx(found["time_to_first_token_ms"])


def test_a_file_whose_metadata_describes_no_model_is_refused(tmp_path):
    for number, model in enumerate((None, {}, {"attention": 3}, {**model_metadata(CONFIGS["flash"]), "ffn_size": "x"})):
        path = tmp_path / f"{number}.pocket"
        write_packed(path, {"model": model}, [lambda: f32("embed", np.zeros(4, np.float32))], lambda data: 0)
        with pytest.raises(PackedFileError, match="describes no model"):
            open_device("model:oneplus_12").measure(MeasureRequest(model=path))


def test_more_work_takes_longer_and_more_threads_shorter():
    shape, profile = MODELS["llama_3_2_1b_int8_head"], load_profile("oneplus_12")

    def total(shape=shape, **changes):
        given = {"tokens": 1, "past": 128, "threads": 1, "kv": "f16", **changes}
        return sum(operation_times(shape, profile, **given).values())

    assert total(past=8000) > total(past=128) and total(tokens=64, past=0) > total()
    assert total(threads=4) < total(threads=2) < total()
    assert total(past=8000, kv="int8", threads=4) < total(past=8000, threads=4)  # one core is too slow to wait for memory
    windows = replace(shape, windows=(256,) * 16)
    assert total(windows, past=8000) == pytest.approx(total(windows, past=4000))
    assert total(windows, past=8000) < total(past=8000)
    skipped = replace(shape, windows=(0, None) * 8)
    assert total(skipped) < total() and operation_times(replace(shape, windows=(0,) * 16), profile, tokens=1, past=9, threads=1,
                                                        kv="f16")["qkv"] == 0  # fmt: skip


def test_unknown_and_damaged_profiles_are_refused(tmp_path):
    with pytest.raises(ValueError, match="expected one of .*oneplus_12"):
        open_device("model:toaster")
    broken = tmp_path / "broken.json"
    good = json.loads((PROFILES / "oneplus_12.json").read_text())
    cores = [{**good["cores"][0], "ghz": "fast"}]
    changes = [{"efficiency": 0}, {"efficiency": float("nan")}, {"cores": cores}, {"launch_us": -1}, {"name": 7}]
    for content in ("", "{}", "[]", "[" * 100_000, *(json.dumps({**good, **change}) for change in changes)):
        broken.write_text(content)
        with pytest.raises(ValueError, match="not a device profile"):
            load_profile(str(broken))
    with pytest.raises(ValueError, match="threads=7; the profile oneplus_12 has 6 cores"):
        load_profile("oneplus_12").slowest(7)
