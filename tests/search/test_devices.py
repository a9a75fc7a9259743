"""Devices: this machine, programs that stand for ssh and adb, and a real sshd on loopback."""

from __future__ import annotations

import json
import os
import platform
import shutil
import socket
import stat
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from search.agent.measuring import Task, measure
from search.devices import DeviceError, MeasureRequest, open_device
from search.devices.base import REQUIRED, parse_output
from search.devices.driver import ProgramDevice, run_command
from search.devices.remote import AdbDriver, SshDriver
from search.reference_output import ReferenceOutput
from tests.helpers.packed_models import CONFIGS, packed

# Runs here what it is told to run there, in a folder of its own; `adb push A B` copies. Notes every call.
FAKE = """#!{python}
import os, shutil, subprocess, sys
root, arguments = {root!r}, sys.argv[1:]
open(root + "/calls", "a").write(" ".join(arguments)[:200] + "\\n")
if os.path.exists(root + "/down"):
    sys.stderr.write("no route to host\\n"); sys.exit(255)
os.environ["HOME"] = root
if "push" in arguments:
    shutil.copy(arguments[-2], root + arguments[-1]); sys.exit(0)
command = arguments[-1].replace("/data/local/tmp", root + "/data/local/tmp")
sys.exit(subprocess.run(["sh", "-c", command], cwd=root, stdin=sys.stdin).returncode)
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return packed(CONFIGS["plain"], tmp_path_factory.mktemp("model"))[1]


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A folder that stands for the device behind `ssh` and `adb`."""
    root = tmp_path / "device"
    (root / "data/local/tmp").mkdir(parents=True)
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    for name in ("ssh", "adb"):
        program = bin_folder / name
        program.write_text(FAKE.format(python=sys.executable, root=str(root)))
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{bin_folder}{os.pathsep}{os.environ['PATH']}")
    return root


def request(model, **changes):
    return MeasureRequest(**{"model": model, "prompt_tokens": 8, "decode_tokens": 4, "repeats": 2, **changes})


def test_this_machine_measures_with_raw_samples(model):
    found = open_device("local").measure(request(model, kv="int8"))
    assert set(REQUIRED) <= found.keys() and found["fidelity"] == "host" and found["device"] == "local"
    assert len(found["samples"]["prefill_seconds"]) == 2 and len(found["samples"]["decode_step_seconds"]) == 8
    assert found["weight_bytes"] == model.stat().st_size < found["peak_memory_bytes"]
    assert found["prefill_tokens_per_second"] > 0 and 0 < found["decode_share_of_bandwidth"]
    assert found["prefill_tokens_per_second"] == pytest.approx(8e3 / found["time_to_first_token_ms"], rel=1e-4)
    assert sum(found["operations"]["decode_ms"].values()) > 0


def test_ssh_and_adb_send_once_and_measure(fake, model):
    here = open_device("local").measure(request(model))
    for spec in ("ssh://user@phone", "adb://R5CT"):
        (fake / "calls").unlink(missing_ok=True)
        first, second = (open_device(spec).measure(request(model)) for _ in range(2))
        assert first["fidelity"] == "device" and first["device"] == spec
        assert first["logits_crc32c"] == second["logits_crc32c"] == here["logits_crc32c"]
        sent = [line for line in (fake / "calls").read_text().splitlines() if "push" in line or "cat > " in line]
        assert len(sent) == 2, "the program and the model, once each"
    assert not [path for path in fake.rglob("*.part")]


def test_a_device_that_cannot_be_reached_is_told_in_one_line(fake, model):
    (fake / "down").touch()
    with pytest.raises(DeviceError, match="ssh://phone: no route to host"):
        open_device("ssh://phone").measure(request(model))


def test_a_refused_request_is_the_users_fault_wherever_it_runs(fake, model):
    for spec in ("local", "ssh://phone", "adb://1"):
        with pytest.raises(ValueError, match="do not fit the session's context of 160"):
            open_device(spec).measure(request(model, prompt_tokens=400))


@pytest.mark.parametrize("spec", ["phone", "ssh://", "ssh://-oProxyCommand=x", "ssh://a b", "adb://", "adb://-x", "adb://a;b",
                                  "qemu-aarch64:a b", "qemu", ""])  # fmt: skip
def test_a_name_of_no_known_form_is_refused(spec):
    with pytest.raises(ValueError, match="expected"):
        open_device(spec)


@pytest.mark.parametrize("answer", ["", "[]", "{}", "nonsense", '{"isa": "x"}'])
def test_an_answer_that_is_none_is_refused(answer):
    with pytest.raises(DeviceError, match="phone"):
        parse_output(answer, "phone", "device")


@pytest.mark.parametrize("change", [{"peak_memory_bytes": "x"}, {"prefill_tokens_per_second": None}, {"threads": float("nan")},
                                    {"operations": [1]}, {"operations": {"decode_ms": {"qkv": "fast"}}}])  # fmt: skip
def test_an_answer_with_a_number_that_is_none_is_refused(change):
    answer = {**dict.fromkeys(REQUIRED, 1), **change}
    with pytest.raises(DeviceError, match=f"phone: its {next(iter(change))}"):
        parse_output(json.dumps(answer), "phone", "device")


def test_a_program_that_hangs_is_stopped_with_all_it_started(tmp_path):
    marker = tmp_path / "alive"
    with pytest.raises(DeviceError, match="longer than 0.5 s"):
        run_command(["sh", "-c", f"(sleep 2; touch {marker}) & wait"], {}, 0.5)
    time.sleep(2)
    assert not marker.exists()


def test_an_emulator_says_no_times(model):
    if shutil.which("qemu-aarch64") is None:
        pytest.skip("qemu-aarch64 is not installed (Debian package qemu-user)")
    try:
        found = open_device("qemu-aarch64").measure(request(model))
    except DeviceError as error:
        pytest.skip(str(error))
    assert found["fidelity"] == "emulated" and found["prefill_tokens_per_second"] is None and found["samples"] == {}
    assert found["logits_crc32c"] == open_device("local").measure(request(model))["logits_crc32c"]


@pytest.fixture
def sshd(tmp_path, monkeypatch):
    """A real sshd on loopback that lets this user in with a key of its own."""
    server = shutil.which("sshd") or ("/usr/sbin/sshd" if os.path.exists("/usr/sbin/sshd") else None)
    if server is None or shutil.which("ssh-keygen") is None:
        pytest.skip("sshd is not installed (Debian package openssh-server)")
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / name)], check=True)
    shutil.copy(tmp_path / "user.pub", tmp_path / "authorized")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.makedirs("/run/sshd", exist_ok=True) if os.geteuid() == 0 else None
    log = tmp_path / "sshd.log"
    process = subprocess.Popen([
        server, "-D", "-f", "/dev/null", "-E", str(log), "-p", str(port), "-h", str(tmp_path / "host"),
        "-o", f"AuthorizedKeysFile={tmp_path / 'authorized'}", "-o", "StrictModes=no", "-o", "ListenAddress=127.0.0.1",
        "-o", f"PidFile={tmp_path / 'pid'}", "-o", "UsePAM=no",
    ])  # fmt: skip
    # The driver takes ssh's own settings; these are in a file that only this test's `ssh` reads.
    config = tmp_path / "config"
    config.write_text(f"IdentityFile {tmp_path / 'user'}\nIdentitiesOnly yes\nUserKnownHostsFile {tmp_path / 'known'}\n"
                      "StrictHostKeyChecking no\nLogLevel ERROR\n")  # fmt: skip
    wrapper = tmp_path / "bin" / "ssh"
    wrapper.parent.mkdir()
    wrapper.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {config} "$@"\n')
    wrapper.chmod(0o755)
    monkeypatch.setenv("PATH", f"{wrapper.parent}{os.pathsep}{os.environ['PATH']}")
    for _ in range(50):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.1)
    yield port
    process.terminate()
    process.wait()


def test_a_real_ssh_connection_measures(sshd, model, tmp_path):
    import getpass

    spec = f"ssh://{getpass.getuser()}@127.0.0.1:{sshd}"
    device = open_device(spec)
    device.driver.folder = str(tmp_path / "there")
    found = device.measure(request(model))
    assert found["fidelity"] == "device" and found["device"] == spec
    assert found["logits_crc32c"] == open_device("local").measure(request(model))["logits_crc32c"]
    assert device.driver.alive() and device.driver.machine == platform.machine()


def test_measure_writes_json_and_a_picture(model, tmp_path):
    from tests.launch.test_cli import command

    done = command("measure", "--model", str(model), "--prompt-tokens", "8", "--decode-tokens", "4", "--repeats", "2",
                   "--output", "m.json", "--plot", "new/m.png", cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert set(REQUIRED) <= json.loads((tmp_path / "m.json").read_text()).keys()
    assert (tmp_path / "new/m.png").read_bytes().startswith(b"\x89PNG")
    assert "avx" in done.stdout or "neon" in done.stdout or "ref" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--device", "toaster"], "device 'toaster'"),
        (["--threads", "0"], "threads=0; expected 1 to"),
        (["--model", "nothing"], "no packed model"),
        (["--prompt-tokens", "1000"], "context of 160"),
        (["--prompt-tokens", "1000", "--device", "model:oneplus_12"], "context of 160"),
        (["--prompt-tokens", "9999999999"], "prompt_tokens=9999999999; expected 1 to"),
        (["--timeout", "nan"], "--timeout nan"),
        (["--timeout", "inf"], "--timeout inf"),
        (["--plot", "p.toast"], "ends in .png"),
        (["--plot", "there.png"], "--plot there.png exists"),
        (["--plot", "p.png", "--device", "qemu-aarch64"], "no times of operations"),
    ],
)
def test_bad_input_to_measure_is_one_line_and_status_2(model, tmp_path, arguments, words):
    from tests.launch.test_cli import command

    (tmp_path / "there.png").touch()
    given = arguments if "--model" in arguments else ["--model", str(model), *arguments]
    done = command("measure", *given, "--output", "m.json", cwd=tmp_path)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and words in done.stderr, done.stderr
    assert not (tmp_path / "m.json").exists()


def test_a_device_that_computes_something_else_is_found_by_this_machines_own_output(fake, model):
    here = open_device("local")
    reference, asked = ReferenceOutput(here), request(model, repeats=3, kv="int8")
    right = reference(asked)
    phone = ProgramDevice(SshDriver("user@phone"))
    answer = measure(phone, Task(request=asked, warmup=1, expect=right))
    assert answer.status in ("ok", "contended") and answer.output_hash == right
    other = reference(replace(asked, prompt_tokens=7))
    assert other != right and measure(phone, Task(request=asked, expect=other)).status == "bad_output"
    assert ReferenceOutput(ProgramDevice(SshDriver("user@phone")))(asked) == right, "kept beside the model"


def test_where_this_machine_cannot_run_models_outputs_are_not_checked(model, tmp_path, caplog):
    class Broken:
        name, fidelity, calls = "local", "host", 0

        def measure(self, request):
            self.calls += 1
            raise DeviceError("pocketforge-run is not there")

    copy = tmp_path / "m.pocket"
    copy.write_bytes(model.read_bytes())
    device = Broken()
    reference = ReferenceOutput(device)
    assert reference(request(copy)) is None and reference(request(copy)) is None and device.calls == 1
    assert "outputs of devices are not checked: pocketforge-run is not there" in caplog.text


def test_adb_is_asked_to_reconnect_and_to_reboot(fake):
    phone = AdbDriver("R5CT")
    phone.reconnect(hard=False)
    phone.reconnect(hard=True)
    assert (fake / "calls").read_text().splitlines() == ["-s R5CT reconnect", "-s R5CT reconnect offline", "-s R5CT reboot"]
