"""The agent and its client: what is asked, what is answered, and what comes of one that lies, stalls or says nothing."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from search.agent.cache import ContentCache
from search.agent.client import AgentDevice
from search.agent.connection import Connection
from search.agent.measuring import Gate, Task, contention, measure, samples_of, throttling
from search.agent.protocol import MAX_REQUEST, ProtocolError
from search.agent.server import Agent, TcpServer
from search.agent.token import TokenError, load_token, make_token
from search.devices import DeviceError, MeasureRequest, open_device
from search.devices.base import DeviceCrash, Thermals
from search.devices.driver import parse_thermals

ROOT = Path(__file__).resolve().parents[2]
TOKEN = "a-token-of-some-length"


def printed(repeats: int, **changes):
    """What pocketforge-run prints, in short."""
    seconds, steps = [0.010] * repeats, [0.002] * (4 * repeats)
    return {"prefill_tokens_per_second": 800.0, "decode_tokens_per_second": 500.0, "time_to_first_token_ms": 10.0,
            "peak_memory_bytes": 1, "weight_bytes": 1, "threads": 1, "isa": "ref", "logits_crc32c": "00c0ffee",
            "prefill_cpu_seconds": 0.0099, "decode_cpu_seconds": 0.00795,
            "samples": {"prefill_seconds": seconds, "decode_step_seconds": steps}, **changes}  # fmt: skip


class FakeDevice:
    name, fidelity = "fake", "host"

    def __init__(self) -> None:
        self.asked, self.gate, self.error, self.changes = [], None, None, {}

    def measure(self, request):
        self.asked.append(request)
        if self.gate is not None:
            self.gate.wait(10)
        if self.error is not None:
            raise self.error
        return printed(request.repeats, **self.changes)


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "m.pocket"
    path.write_bytes(os.urandom(1 << 20))  # two chunks
    return path


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A served fake device, and its address."""
    monkeypatch.setenv("POCKETFORGE_AGENT_TOKEN", TOKEN)
    device = FakeDevice()
    with TcpServer(("127.0.0.1", 0), Agent(device, ContentCache(tmp_path / "cache", 4 << 20), TOKEN)) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield device, f"127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def task(model, **changes):
    return Task(request=MeasureRequest(model=model, prompt_tokens=8, decode_tokens=4, repeats=5, **changes))


def raw(address, *lines, patience=5.0):
    """What comes back for bytes that no client of ours would send."""
    host, port = address.rsplit(":", 1)
    with socket.create_connection((host, int(port)), patience) as link:
        link.sendall(b"".join(lines))
        link.shutdown(socket.SHUT_WR)
        return [json.loads(line) for line in link.makefile("rb")]


HELLO = json.dumps({"verb": "hello", "proto": 1, "token": TOKEN}).encode() + b"\n"


def test_a_model_is_sent_once_and_every_repeat_comes_back(served, model):
    device, address = served
    agent = open_device(f"agent://{address}")
    answer = agent.run(task(model), "job-1", fence=3)
    assert answer.status == "ok" and answer.fidelity == "host" and answer.output_hash == "00c0ffee"
    assert [sample["warmup"] for sample in answer.samples] == [True] * 4 + [False] * 5
    assert answer.counted("ttft_ms") == [10.0] * 5 and answer.counted("decode_tok_s") == [500.0] * 5
    assert device.asked[0].model.name == hashlib.sha256(model.read_bytes()).hexdigest()
    assert device.asked[0].model.read_bytes() == model.read_bytes()
    sent = len(list(device.asked[0].model.parent.iterdir()))
    assert agent.run(task(model), "job-1", fence=3) == answer and len(device.asked) == 1, "not measured twice for a lost link"
    assert agent.run(task(model), "job-1", fence=4).status == "ok" and len(device.asked) == 2
    assert len(list(device.asked[0].model.parent.iterdir())) == sent and agent.alive() and agent.greeting()["version"]
    found = agent.measure(MeasureRequest(model=model))
    assert found["device"] == f"agent://{address}" and found["time_to_first_token_ms"] == 10.0


def test_without_the_token_nothing_is_done_and_the_token_is_never_logged(served, model, monkeypatch, caplog):
    caplog.set_level(logging.DEBUG)
    device, address = served
    monkeypatch.setenv("POCKETFORGE_AGENT_TOKEN", "another-token-altogether")
    with pytest.raises(DeviceError, match="not this agent's; set POCKETFORGE_AGENT_TOKEN"):
        _ = AgentDevice(address).fidelity
    answer = AgentDevice(address).run(task(model), "j")
    assert answer.status == "lost" and answer.started is None, "a try that never began does not count"
    monkeypatch.delenv("POCKETFORGE_AGENT_TOKEN")
    with pytest.raises(DeviceError, match="not this agent's"):
        _ = AgentDevice(address).fidelity
    (refused,) = raw(address, b'{"verb":"status"}\n', HELLO)
    assert refused["error"] == "unauthorized" and device.asked == [] and TOKEN not in caplog.text
    (refused,) = raw(address, HELLO.replace(b'"proto": 1', b'"proto": 2'))
    assert "proto='2'" in refused["reason"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"nonsense\n", "no JSON"),
        (b"[]\n", "no JSON object"),
        (b'{"verb":"measure","repeats":NaN}\n', "no JSON"),
        (b"[" * 100_000 + b"\n", "no JSON"),
        (b"x" * (MAX_REQUEST + 10) + b"\n", "more than"),
        (b'{"verb":"status"', "ended inside a line"),
        (b'{"verb":"format","disk":1}\n', "verb 'format'"),
        (b'{"verb":["put"]}\n', "verb"),
        (b'{"verb":"put","sha256":"../../etc/passwd","size":5}\n', "SHA-256"),
        (b'{"verb":"put","sha256":"%s","size":99999999}\n' % (b"0" * 64), "this agent's cache holds"),
        (b'{"verb":"put","sha256":"%s","size":3,"chunk":"AAAA"}\n' % (b"0" * 64), "nothing of it was kept"),
        (b'{"verb":"put","sha256":"%s","size":2,"chunk":"AAAA"}\n' % (b"0" * 64), "more than the 2 bytes"),
        (b'{"verb":"put","sha256":"%s","size":9,"offset":4,"chunk":"AAAA"}\n' % (b"0" * 64), "0 bytes are held"),
        (b'{"verb":"put","sha256":"%s","size":9,"chunk":"*"}\n' % (b"0" * 64), "base64"),
        (b'{"verb":"put","sha256":"%s","size":true}\n' % (b"0" * 64), "size='True'"),
        (b'{"verb":"measure","job":"j","model":"%s","prompt_tokens":[8]}\n' % (b"0" * 64), "put it first"),
        (b'{"verb":"measure","job":"j","model":"%s","prompt_tokens":[8],"runtime":"aa"}\n' % (b"0" * 64), "runs its own"),
        (b'{"verb":"measure","job":"j","model":"%s","prompt_tokens":[8,9]}\n' % (b"0" * 64), "one a measurement"),
        (b'{"verb":"measure","job":7,"model":"%s","prompt_tokens":[8]}\n' % (b"0" * 64), "job='7'"),
    ],
)  # fmt: skip
def test_untrusted_bytes_get_words_and_do_nothing(served, tmp_path, line, words):
    device, address = served
    hello, refused = raw(address, HELLO, line)
    assert hello["proto"] == 1 and words in refused["reason"] and device.asked == []
    assert not list((tmp_path / "cache").iterdir()), "nothing of it was kept"
    assert raw(address, HELLO)[0]["device"] == "fake", "the next connection is served as before"


def test_unknown_fields_are_ignored(served):
    _, address = served
    known, state, bye = raw(address, HELLO, b'{"verb":"status","colour":"red","id":"x"}\n', b'{"verb":"bye"}\n', b"{}\n")
    assert state == {"state": "idle", "id": "x"} and bye == {"bye": True}


def test_one_measurement_at_a_time_which_can_be_asked_about_and_stopped(served, model):
    device, address = served
    device.gate = threading.Event()
    first, second = AgentDevice(address), AgentDevice(address)
    found = []
    worker = threading.Thread(target=lambda: found.append(first.run(task(model), "one")))
    worker.start()
    while not device.asked:
        time.sleep(0.01)
    busy = second.run(task(model), "two")
    assert busy.status == "contended" and "measuring one" in busy.reason and busy.started is None
    assert second.heartbeat("one") and not second.heartbeat("two") and not second.cancel("two")
    assert second.cancel("one")
    device.gate.set()
    worker.join(10)
    assert len(found) == 1 and len(device.asked) == 1 and not second.heartbeat("one")


def test_a_heartbeat_keeps_the_lease_of_a_slow_device_and_only_that(served, model, tmp_path):
    from search.farm import Farm
    from search.jobs import violations
    from search.members import Member, Policy
    from search.store import Store

    device, address = served
    device.gate = threading.Event()
    for beats, attempts in ((0.05, 0), (60.0, 1)):
        policy = Policy(lease_factor=0.01, heartbeat_s=beats)  # a lease of 0.3 s
        with Store.open(tmp_path / f"{beats}.sqlite", {}) as store:
            farm = Farm(store, [Member(AgentDevice(address))], policy=policy)
            job = farm.submit(f"job-{beats}", MeasureRequest(model=model, timeout_s=30.0))
            device.gate.clear()
            with farm:
                while not store.rows("SELECT 1 FROM jobs WHERE state = 'running'"):
                    time.sleep(0.01)
                time.sleep(0.9)
                farm.expire()
                device.gate.set()
                while not farm.queue.job(job).ended:
                    time.sleep(0.02)
            assert farm.queue.job(job).state == "ok" and farm.queue.job(job).attempts == attempts
            assert len(store.events("late_answer")) == attempts and violations(farm.queue) == []


def test_what_the_device_does_is_in_the_status(served, model):
    device, address = served
    agent = AgentDevice(address)
    expectations = [
        (DeviceCrash("ended with status 139", 139, "segfault"), "crashed"), (DeviceCrash("killed", -9), "oom"),
        (DeviceCrash("ended", 1, "error: no memory"), "oom"), (DeviceError("gone"), "lost"),
        (ValueError("context"), "unsupported"), (RuntimeError("a bug"), "lost"),
    ]  # fmt: skip
    for fence, (device.error, status) in enumerate(expectations):
        answer = agent.run(task(model), "j", fence)
        assert answer.status == status and not answer.samples, answer
    device.error, device.changes = None, {"logits_crc32c": "deadbeef"}
    wrong = agent.run(replace(task(model), expect="00c0ffee"), "j", 100)
    assert wrong.status == "bad_output" and "deadbeef, expected 00c0ffee" in wrong.reason


# What a bad agent sends after it was greeted; {mark} is the request's.
OK = ('{{"id":{mark},"status":"ok","samples":[{{"warmup":false,"ttft_ms":%s,"decode_tok_s":9}}],"fidelity":"%s",'
      '"output_hash":"%s"}}\n')  # fmt: skip
BAD = {
    "silent": (None, "timeout", "no answer to measure within"),
    "hangs up": ("", "lost", "the connection ended"),
    "nonsense": ("hello?\n", "lost", "nonsense"),
    "half a line": ('{{"id":1', "lost", "nonsense"),
    "another id": ('{{"id":99999,"status":"ok"}}\n', "lost", "connection ended"),
    "no status": ('{{"id":{mark},"status":"splendid"}}\n', "lost", "expected an object with a status"),
    "no samples": ('{{"id":{mark},"status":"ok","samples":[]}}\n', "lost", "gives no samples"),
    "negative": (OK % ("-1", "host", "x"), "lost", "finite number above 0"),
    "NaN": (OK % ("NaN", "host", "x"), "lost", "nonsense"),
    "a string": (OK % ('"fast"', "host", "x"), "lost", "finite number above 0"),
    "a measurement of words": ('{{"id":{mark},"status":"contended","measurement":{{"isa":"ref"}}}}\n', "lost", "answer lacks"),
    "a word for a number": ('{{"id":{mark},"status":"hot","measurement":{{"peak_memory_bytes":"big"}}}}\n', "lost", "lacks"),
    "too much": (OK % ("9e6", "host", "x"), "lost", "timed 9000.0 s within"),
    "other fidelity": (OK % ("5", "device", "x"), "lost", "never mixed"),
    "wrong output": (OK % ("0.001", "host", "666"), "bad_output", "checksum 666, expected right"),
}


@pytest.fixture
def bad_agent(monkeypatch):
    """Greets as an agent does and has every file; answers `measure` with what it is told to."""
    monkeypatch.setattr("search.agent.client.MARGIN_S", 0.3)
    listener = socket.create_server(("127.0.0.1", 0))
    script = []

    def talk():
        while True:
            try:
                link, _ = listener.accept()
            except OSError:
                return
            with link, link.makefile("rwb") as stream:
                for line in stream:
                    request = json.loads(line)
                    if request["verb"] == "measure":
                        if script[0] is None:
                            time.sleep(1.0)
                        else:
                            stream.write(script[0].format(mark=request["id"]).encode())
                        break
                    greeting = {"proto": 1, "fidelity": "host", "have": True, "stored": True, "id": request["id"]}
                    stream.write(json.dumps(greeting).encode() + b"\n")
                    stream.flush()

    threading.Thread(target=talk, daemon=True).start()
    yield script, f"127.0.0.1:{listener.getsockname()[1]}"
    listener.close()


@pytest.mark.parametrize("kind", list(BAD))
def test_a_bad_device_is_told_in_words_and_never_believed(bad_agent, model, kind):
    (says, status, words), (script, address) = BAD[kind], bad_agent
    script.append(says)
    answer = AgentDevice(address).run(replace(task(model, timeout_s=0.2), expect="right"), "j")
    assert answer.status == status and words in answer.reason and answer.samples == () and answer.started is not None, answer
    assert f"agent://{address}" in answer.reason


def test_an_agent_that_is_not_there_or_is_something_else(model):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    answer = AgentDevice(f"127.0.0.1:{port}").run(task(model), "j")
    assert answer.status == "lost" and "is launch/agent.py running there" in answer.reason and answer.started is None
    assert not AgentDevice(f"127.0.0.1:{port}").alive()
    for spec in ("agent://", "agent://phone", "agent://phone:0", "agent://phone:99999", "agent://a b:7"):
        with pytest.raises(ValueError, match="expected"):
            open_device(spec)


class Warm(FakeDevice):
    def __init__(self, temperatures, limits=((2000.0,), (2000.0,))) -> None:
        super().__init__()
        self.temperatures, self.limits = list(temperatures), list(limits)

    def thermals(self):
        limit = self.limits.pop(0) if len(self.limits) > 1 else self.limits[0]
        return Thermals(self.temperatures.pop(0) if len(self.temperatures) > 1 else self.temperatures[0], limit, limit)


def test_the_gate_waits_gives_up_and_sees_throttling(model):
    now = [0.0]

    def sleep(seconds):
        now[0] += seconds

    asked = replace(task(model), gate=Gate(37.0, max_wait_s=60.0))
    cooled = measure(Warm([50, 45, 36, 40]), asked, lambda: now[0], sleep)
    assert cooled.status == "ok" and cooled.before.max_c == 36 and now[0] == 10.0
    hot = measure(Warm([50]), asked, lambda: now[0], sleep)
    assert hot.status == "hot" and now[0] == 70.0 and "the gate is 37 C" in hot.reason and hot.started is None
    held = measure(Warm([30], [(2000.0,), (1500.0,)]), asked, lambda: now[0], sleep)
    assert held.status == "throttled" and "core 0 was held to 1500 MHz after timing, 2000 before" in held.reason
    assert throttling(Thermals(30), Thermals(60), Gate(throttle_c=50)) and not throttling(Thermals(), Thermals(), Gate())


def test_contention_is_told_by_processor_time_of_one_thread(model):
    assert contention(printed(5)) == pytest.approx(0.010 / 0.0099)
    assert contention(printed(5, decode_cpu_seconds=0.004)) == pytest.approx(2.0)
    assert contention(printed(5, threads=2, prefill_cpu_seconds=0.001)) is None and contention({"samples": {}}) is None
    device = FakeDevice()
    device.changes = {"prefill_cpu_seconds": 0.008}
    assert measure(device, task(model)).status == "contended"
    assert samples_of({"samples": {}, "time_to_first_token_ms": None}, 4) == ()
    computed = samples_of({"samples": {}, "time_to_first_token_ms": 3.0, "decode_tokens_per_second": 7.0}, 4)
    assert computed[0]["ttft_ms"] == 3.0 and not computed[0]["warmup"]


def test_thermals_are_read_from_what_a_device_prints():
    text = ("zone battery 31000\nzone cpu-0-0 45200\nzone cpu-1 -274000\nzone gpu \nzone cpu-2 999000\n"
            "core 1800000 2000000\ncore\n")  # fmt: skip
    assert parse_thermals(text) == Thermals(45.2, (1800.0,), (2000.0,))
    said = """  Temperature{mValue=38.5, mType=0, mName=CPU0, mStatus=0}
    Temperature{mValue=31.2, mType=2, mName=battery, mStatus=0}\n""" + text
    assert parse_thermals(said) == Thermals(38.5, (1800.0,), (2000.0,)), "Android's own service comes first"
    assert parse_thermals("zone battery 31000\n").max_c == 31.0 and parse_thermals("") == Thermals()


def test_the_cache_goes_on_from_a_half_file_and_drops_the_least_recently_used(tmp_path):
    cache = ContentCache(tmp_path, 100)
    blobs = [bytes([i]) * 40 for i in range(3)]
    names = [hashlib.sha256(blob).hexdigest() for blob in blobs]
    assert cache.add(names[0], 40, 0, blobs[0][:10]) == (False, 10) and cache.get(names[0]) is None
    assert cache.add(names[0], 40, 0, b"") == (False, 10)
    assert cache.add(names[0], 40, 10, blobs[0][10:]) == (True, 40)
    cache.add(names[1], 40, 0, blobs[1])
    os.utime(tmp_path / names[1], (1, 1))
    cache.add(names[2], 40, 0, blobs[2])
    assert [cache.get(name) is not None for name in names] == [True, False, True]
    (tmp_path / f"{names[1]}.part").write_bytes(b"left by a killed agent")
    ContentCache(tmp_path, 100)
    assert not list(tmp_path.glob("*.part"))
    with pytest.raises(ProtocolError, match="cache holds 100"):
        cache.add(names[1], 101, 0, b"x")


def test_tokens_are_private_long_and_made_once(tmp_path, monkeypatch):
    file = tmp_path / "secret" / "token"
    assert load_token(file) is None
    made = make_token(file)
    assert load_token(file) == made and file.stat().st_mode & 0o777 == 0o600
    monkeypatch.setenv("POCKETFORGE_AGENT_TOKEN_FILE", str(file))
    assert load_token() == made
    file.chmod(0o644)
    with pytest.raises(TokenError, match="chmod 600"):
        load_token(file)
    monkeypatch.setenv("POCKETFORGE_AGENT_TOKEN", "short")
    with pytest.raises(TokenError, match="has 5 characters; expected 16"):
        load_token()


@pytest.fixture(scope="module")
def packed_model(tmp_path_factory):
    from tests.helpers.packed_models import CONFIGS, packed

    return packed(CONFIGS["plain"], tmp_path_factory.mktemp("model"))[1]


def agent_command(*arguments, cache):
    return [sys.executable, str(ROOT / "launch" / "agent.py"), "--cache", str(cache), *arguments]


def test_the_command_serves_this_machine_over_a_socket_and_a_pipe(packed_model, tmp_path, monkeypatch):
    monkeypatch.delenv("POCKETFORGE_AGENT_TOKEN", raising=False)
    request = MeasureRequest(model=packed_model, prompt_tokens=8, decode_tokens=4, repeats=2)
    here = open_device("local").measure(request)
    file = tmp_path / "token"
    process = subprocess.Popen(agent_command("--listen", "127.0.0.1:0", "--token-file", str(file), cache=tmp_path / "a"),
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)  # fmt: skip
    try:
        token = re.fullmatch(r"token (\S+)\n", process.stdout.readline())[1]
        spec = re.match(r"(agent://127\.0\.0\.1:\d+) serves local \(host\)", process.stdout.readline())[1]
        assert file.read_text().strip() == token
        monkeypatch.setenv("POCKETFORGE_AGENT_TOKEN_FILE", str(file))
        device = open_device(spec)
        found = device.measure(request)
        assert found["logits_crc32c"] == here["logits_crc32c"] and found["device"] == spec and found["fidelity"] == "host"
        answer = device.run(Task(request=request, warmup=1, expect=here["logits_crc32c"]), "j", 1)
        assert answer.status in ("ok", "contended") and len(answer.samples) == 3 and answer.started < answer.ended
        assert answer.measurement["read_bandwidth_before"] > 0
        fast = device.run(Task(request=replace(request, bandwidth=False)), "j", 2).measurement
        assert fast["read_bandwidth_before"] == 0 and fast["logits_crc32c"] == here["logits_crc32c"]
        with pytest.raises(ValueError, match="context of 160"):
            device.measure(replace(request, prompt_tokens=400))
    finally:
        process.kill()
        assert token not in process.communicate()[1], "never logged"
    piped = AgentDevice("pipe", agent_command("--listen", "stdio", cache=tmp_path / "b"))
    assert piped.measure(request)["logits_crc32c"] == here["logits_crc32c"]
    piped.close()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--listen", "everywhere"], "expected HOST:PORT"),
        (["--device", "toaster"], "device 'toaster'"),
        (["--device", "agent://127.0.0.1:7"], "not another agent"),
        (["--cache-gb", "0"], "--cache-gb 0"),
    ],
)
def test_bad_input_to_the_agent_is_one_line_and_status_2(tmp_path, arguments, words):
    done = subprocess.run(agent_command(*arguments, cache=tmp_path), capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and words in done.stderr, done.stderr


def test_a_pipe_that_goes_silent_is_cut(tmp_path):
    code = "import sys, time; print('{\"proto\":1,\"fidelity\":\"host\"}', flush=True); time.sleep(60)"
    link = Connection.pipe("agent://pipe", [sys.executable, "-c", code])
    start = time.monotonic()
    with pytest.raises(DeviceError, match="no answer to status within 0.3 s"):
        link.ask("status", 0.3)
    assert time.monotonic() - start < 5
    link.close()
