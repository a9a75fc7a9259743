"""Serves one device: requests come from a pipe or a socket, and every byte of them is untrusted."""

from __future__ import annotations

import base64
import binascii
import contextlib
import logging
import platform
import socket
import socketserver
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from search.agent.answer import Answer
from search.agent.cache import ContentCache
from search.agent.measuring import Task
from search.agent.protocol import (
    CHUNK,
    MAX_REQUEST,
    PROTO,
    Fields,
    ProtocolError,
    Reader,
    Writer,
    encode,
    read_message,
)
from search.agent.slot import Slot
from search.agent.token import same_token
from search.devices.base import Device, DeviceError, MeasureRequest
from search.devices.driver import ProgramDevice

HELLO_S = 10.0
IDLE_S = 3600.0
MAX_CONNECTIONS = 16
DRIVERS = ("local", "ssh", "adb", "qemu", "model")
FINGERPRINT = ("uname -srm; nproc; grep MemTotal /proc/meminfo; getprop ro.product.model; getprop ro.soc.model;"
               " command -v taskset")  # fmt: skip
log = logging.getLogger(__name__)


@dataclass
class Agent:
    """What all connections share. `token` None: whoever holds the pipe started this process and needs none."""

    device: Device
    cache: ContentCache
    token: str | None

    def __post_init__(self) -> None:
        self.slot = Slot(self.device)
        self.fingerprint = fingerprint(self.device)

    def serve(self, reader: Reader, writer: Writer, patience: Callable[[float], None] = lambda _: None) -> None:
        """Answer one connection until it ends. `patience` sets how many seconds to wait for its next line."""
        Session(self, reader, writer, patience).run()


class Session:
    """One connection. Requests are read in order; a measurement runs beside them, so that it can be asked about."""

    def __init__(self, agent: Agent, reader: Reader, writer: Writer, patience: Callable[[float], None]) -> None:
        self.agent, self.reader, self.writer, self.patience = agent, reader, writer, patience
        self._write = threading.Lock()
        self._known = False
        self._workers: list[threading.Thread] = []

    def run(self) -> None:
        self.patience(HELLO_S)
        try:
            while (message := read_message(self.reader, MAX_REQUEST)) is not None:
                if not self._answer(message):
                    break
        except ProtocolError as error:  # the next line's start is unknown: say it and hang up
            self._send({"error": "malformed", "reason": str(error)}, None)
        except OSError:
            log.info("a connection ended without a word")
        for worker in self._workers:  # over a pipe the process ends with the connection: not before its answer is out
            worker.join()

    def _answer(self, message: Mapping[str, Any]) -> bool:
        """False to hang up."""
        verb, mark = message.get("verb"), message.get("id")
        handler = VERBS.get(verb) if isinstance(verb, str) else None
        try:
            if not self._known and verb != "hello":
                self._send({"error": "unauthorized", "reason": "hello comes first, with the agent's token"}, mark)
                return False
            if handler is None:
                self._send({"status": "unsupported", "error": "unsupported", "reason": f"verb {str(verb)[:40]!r}"}, mark)
                return True
            answer = handler(self, Fields(message))
        except ProtocolError as error:
            self._send({"error": "malformed", "reason": str(error)}, mark)
            return self._known
        if answer is not None:
            self._send(answer, mark)
        return self._known and verb != "bye"

    def _send(self, answer: Mapping[str, Any], mark: Any) -> None:
        line = encode({**answer, **({"id": mark} if isinstance(mark, str | int) else {})})
        with self._write, contextlib.suppress(OSError, ValueError):  # who hung up does not want it; the slot keeps it
            self.writer.write(line)
            self.writer.flush()

    def hello(self, fields: Fields) -> dict[str, Any]:
        if fields.message.get("proto") != PROTO:
            raise ProtocolError(f"proto={str(fields.message.get('proto'))[:20]!r}; this agent speaks {PROTO}")
        token = self.agent.token
        if token is not None and not same_token(fields.message.get("token"), token):
            time.sleep(0.2)
            return {"proto": PROTO, "error": "unauthorized", "reason": "the token is not this agent's"}
        self._known = True
        self.patience(IDLE_S)
        device, facts = self.agent.device, self.agent.fingerprint
        return {"proto": PROTO, "device": device.name, "fidelity": device.fidelity, "fingerprint": facts,
                "drivers": DRIVERS, "clock": time.time(), "version": version("pocketforge"),
                "can_pin": "taskset" in facts.get("said", ""), "can_set_freq": False}  # fmt: skip

    def put(self, fields: Fields) -> dict[str, Any]:
        sha256, size = fields.sha256("sha256"), fields.integer("size", 1, 1 << 40)
        if self.agent.cache.get(sha256) is not None:
            return {"have": True, "stored": True}
        text = fields.text("chunk", 4 * (CHUNK // 3 + 2), "")
        try:
            data = base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError):
            raise ProtocolError("chunk is not base64") from None
        stored, held = self.agent.cache.add(sha256, size, fields.integer("offset", 0, 1 << 40, 0), data)
        return {"have": False, "stored": stored, "held": held}

    def measure(self, fields: Fields) -> None:
        """Starts the measurement; its answer follows when it ends."""
        job, fence = fields.text("job", 200), fields.integer("fence", 0, 1 << 53, 0)
        mark = fields.message.get("id")
        try:
            task = self._task(fields)
        except Unsupported as error:
            device = self.agent.device
            answer = Answer(status="unsupported", device=device.name, fidelity=device.fidelity, reason=str(error))
            self._send(answer.wire(), mark)
            return
        worker = threading.Thread(target=self._measure, args=(job, fence, task, mark), daemon=True)
        self._workers = [*(thread for thread in self._workers if thread.is_alive()), worker]
        worker.start()

    def _measure(self, job: str, fence: int, task: Task, mark: Any) -> None:
        found = self.agent.slot.run(job, fence, task)
        if isinstance(found, Answer):
            self._send({**found.wire(), "job": job, "fence": fence}, mark)
        else:
            self._send({"error": "busy", "reason": f"measuring {found}", "job": job, "fence": fence}, mark)

    def _task(self, fields: Fields) -> Task:
        sha256 = fields.sha256("model")
        if fields.message.get("runtime") is not None:
            raise Unsupported("runtime: this agent runs its own and no program that is sent")
        if fields.message.get("prompts"):
            raise Unsupported("prompts: the runtime times a fixed prompt of the length asked for")
        lengths = fields.integers("prompt_tokens", 8, 1 << 20)
        if len(lengths) != 1:
            raise Unsupported(f"prompt_tokens: {len(lengths)} lengths; ask for one a measurement")
        kv = fields.text("kv", 8, "f16")
        path = self.agent.cache.get(sha256)
        if path is None:
            raise ProtocolError(f"model {sha256} is not here; put it first")
        if kv not in ("f32", "f16", "int8"):
            raise ProtocolError(f"kv={kv!r}; expected f32, f16 or int8")
        expect = fields.message.get("expect")
        try:
            request = MeasureRequest(
                model=path, prompt_tokens=lengths[0], decode_tokens=fields.integer("gen_tokens", 1, 1 << 20, 32),
                threads=fields.integer("threads", 1, 1024, 1), repeats=fields.integer("repeats", 1, 1000, 5),
                kv=kv,  # type: ignore[arg-type]
                timeout_s=fields.number("timeout_s", 0.1, 86400, 600), cores=fields.integers("cores", 1024, 4096),
                bandwidth=fields.message.get("bandwidth") is True,
            )  # fmt: skip
        except ValueError as error:
            raise ProtocolError(str(error)) from None
        return Task(request=request, warmup=fields.integer("warmup", 0, 100, 4), rest_s=fields.number("rest_s", 0, 600, 0),
                    gate=fields.gate(), expect=None if expect is None else fields.text("expect", 64))  # fmt: skip

    def status(self, fields: Fields) -> dict[str, Any]:
        return {"state": self.agent.slot.state(fields.text("job", 200, ""))}

    def cancel(self, fields: Fields) -> dict[str, Any]:
        return {"cancelled": self.agent.slot.cancel(fields.text("job", 200))}

    def bye(self, fields: Fields) -> dict[str, Any]:
        return {"bye": True}


class Unsupported(Exception):
    """Of this protocol, and more than this agent can do."""


VERBS: dict[str, Callable[[Session, Fields], dict[str, Any] | None]] = {
    "hello": Session.hello, "put": Session.put, "measure": Session.measure, "status": Session.status,
    "cancel": Session.cancel, "bye": Session.bye,
}  # fmt: skip


class TcpServer(socketserver.ThreadingTCPServer):
    """Listens; refuses more connections than an agent has any use for."""

    allow_reuse_address, daemon_threads = True, True

    def __init__(self, address: tuple[str, int], agent: Agent) -> None:
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self.agent, self._room = agent, threading.BoundedSemaphore(MAX_CONNECTIONS)
        super().__init__(address, _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._room.acquire(blocking=False):
            log.warning("more than %d connections; one from %s was closed", MAX_CONNECTIONS, client_address[0])
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._room.release()


class _Handler(socketserver.StreamRequestHandler):
    disable_nagle_algorithm = True

    def handle(self) -> None:
        assert isinstance(self.server, TcpServer)
        self.server.agent.serve(self.rfile, self.wfile, self.connection.settimeout)


def fingerprint(device: Device) -> dict[str, str]:
    """What the device says of itself; of a modelled one, that this machine computes it."""
    if isinstance(device, ProgramDevice) and device.fidelity != "emulated":
        try:
            return {"said": " | ".join(device.driver.run(["sh", "-c", FINGERPRINT], {}, 30.0).out.split("\n"))[:1000]}
        except DeviceError as error:
            return {"said": "", "unreachable": str(error)[:300]}
    return {"said": f"computed on {platform.machine()}"}
