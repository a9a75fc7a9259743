"""Machines and phones at the other end of ssh or adb. Files go there once, named by their content; nothing else is left."""

from __future__ import annotations

import logging
import platform
import re
import shlex
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

from search.devices.base import DeviceError, Fidelity
from search.devices.driver import Finished, LocalDriver, content_name, cross_program, run_command

log = logging.getLogger(__name__)
TRANSFER_S = 1800.0
CALL_S = 60.0


class RemoteDriver:
    """What ssh and adb share: a shell there, a folder for files, the program for its kind of machine."""

    fidelity: Fidelity = "device"
    name: str
    folder: str

    def shell(self, command: str, timeout_s: float, stdin: Path | None = None) -> Finished:
        raise NotImplementedError

    def run(self, command: Sequence[str], environment: Mapping[str, str], timeout_s: float) -> Finished:
        settings = [f"{key}={value}" for key, value in environment.items()]
        # `timeout` there as well: a connection that drops must not leave the program running.
        limited = ["timeout", f"{int(timeout_s) + 1}", *(["env", *settings] if settings else []), *command]
        return self.shell(shlex.join(limited), timeout_s + CALL_S)

    def put(self, local: Path) -> str:
        remote = f"{self.folder}/{content_name(local)}"
        size = local.stat().st_size
        held = self.checked(f"mkdir -p {shlex.quote(self.folder)} && (wc -c < {shlex.quote(remote)} 2>/dev/null || echo none)")
        if held.strip() == str(size):
            return remote
        self.send(local, f"{remote}.part")
        self.checked(f"chmod 755 {shlex.quote(remote)}.part && mv {shlex.quote(remote)}.part {shlex.quote(remote)}")
        return remote

    def send(self, local: Path, remote: str) -> None:
        raise NotImplementedError

    def read(self, remote: str) -> bytes:
        return self.checked(f"cat {shlex.quote(remote)}").encode()

    def remove(self, remote: str) -> None:
        self.checked(f"rm -f {shlex.quote(remote)}")

    def alive(self) -> bool:
        try:
            return self.shell("true", CALL_S).status == 0
        except DeviceError:
            return False

    def lost(self, finished: Finished) -> bool:
        raise NotImplementedError

    def checked(self, command: str) -> str:
        finished = self.shell(command, CALL_S)
        if finished.status:
            reason = (finished.err or finished.out).strip().splitlines()
            raise DeviceError(f"{self.name}: {reason[-1][:300] if reason else 'no answer'} (status {finished.status}); "
                              "check that the device can be reached without a password")
        return finished.out

    @cached_property
    def machine(self) -> str:
        """`uname -m` there."""
        found = self.checked("uname -m").strip()
        if not re.fullmatch(r"[\w-]+", found):
            raise DeviceError(f"{self.name}: uname -m said {found[:60]!r}; expected a kind of machine such as aarch64")
        return "aarch64" if found == "arm64" else found

    def program(self) -> str:
        local = Path(LocalDriver().program()) if self.machine == platform.machine() else cross_program(self.machine)
        return self.put(local)


class SshDriver(RemoteDriver):
    """user@host, with keys: nobody is there to type a password."""

    OPTIONS = ("-o", "BatchMode=yes", "-o", "ConnectTimeout=10", "-o", "ServerAliveInterval=15", "-o", "ServerAliveCountMax=4")

    def __init__(self, target: str) -> None:
        if not re.fullmatch(r"(?:[\w.-]+@)?[\w.:\[\]-]+", target) or target.startswith("-"):
            raise ValueError(f"ssh://{target}: expected ssh://user@host")
        match = re.fullmatch(r"(.*[^:\]]):(\d+)", target)
        self.target, port = (match[1], ["-p", match[2]]) if match else (target, [])
        self.port = port
        self.name, self.folder = f"ssh://{target}", ".cache/pocketforge"

    def shell(self, command: str, timeout_s: float, stdin: Path | None = None) -> Finished:
        return run_command(["ssh", *self.OPTIONS, *self.port, self.target, command], {}, timeout_s, stdin)

    def lost(self, finished: Finished) -> bool:
        return finished.status == 255  # ssh's own failures; the program there has others

    def send(self, local: Path, remote: str) -> None:
        finished = self.shell(f"cat > {shlex.quote(remote)}", TRANSFER_S, stdin=local)
        if finished.status:
            raise DeviceError(f"{self.name}: {local.name} could not be sent ({finished.err.strip()[-200:]})")


class AdbDriver(RemoteDriver):
    """An Android device by its serial number."""

    def __init__(self, serial: str) -> None:
        if not re.fullmatch(r"[\w.:-]+", serial) or serial.startswith("-"):
            raise ValueError(f"adb://{serial}: expected adb://SERIAL, as `adb devices` lists it")
        self.serial = serial
        self.name, self.folder = f"adb://{serial}", "/data/local/tmp/pocketforge"

    def shell(self, command: str, timeout_s: float, stdin: Path | None = None) -> Finished:
        return run_command(["adb", "-s", self.serial, "shell", command], {}, timeout_s, stdin)

    def reconnect(self, hard: bool) -> None:
        """Ask adb to forget and find the device again; `hard` reboots it. Whether that helped is for `alive` to say."""
        steps = [["reboot"]] if hard else [["reconnect"], ["reconnect", "offline"]]
        for step in steps:
            finished = run_command(["adb", "-s", self.serial, *step], {}, CALL_S)
            log.info("%s: adb %s: %s", self.name, " ".join(step), (finished.out + finished.err).strip()[:200])

    def lost(self, finished: Finished) -> bool:
        return bool(re.match(r"adb: |error: (device|no devices|closed|protocol)", finished.err))

    def send(self, local: Path, remote: str) -> None:
        finished = run_command(["adb", "-s", self.serial, "push", str(local), remote], {}, TRANSFER_S)
        if finished.status:
            raise DeviceError(f"{self.name}: {local.name} could not be sent ({finished.err.strip()[-200:]})")
