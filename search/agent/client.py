"""A device behind an agent, as a search sees it. What the agent says is untrusted, and it may say nothing at all."""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

from search.agent.answer import Answer, AnswerError, parse_answer
from search.agent.connection import Connection
from search.agent.measuring import Task
from search.agent.token import load_token
from search.devices.base import (
    BadOutput,
    DeviceCrash,
    DeviceError,
    DeviceTimeout,
    Fidelity,
    Measurement,
    MeasureRequest,
)

MARGIN_S = 30.0
"""Beyond what a measurement may take by its own limits, before the agent counts as silent."""


class AgentDevice:
    """Implements search.devices.base.Device; `run` gives the whole answer, with lease and fence, to a farm."""

    def __init__(self, address: str, command: Sequence[str] | None = None) -> None:
        """`address` is HOST:PORT, or a name for the agent that `command` starts on a pipe. Nothing is contacted yet.

        Raises ValueError.
        """
        self.name, self.command = f"agent://{address}", command
        match = re.fullmatch(r"(?:\[([0-9a-fA-F:]+)\]|([\w.-]+)):(\d{1,5})", address)
        if command is None and (match is None or not 0 < int(match[3]) < 65536):
            raise ValueError(f"{self.name}: expected agent://HOST:PORT, as launch/agent.py --listen has it")
        self._host, self._port = ("", 0) if match is None else (match[1] or match[2], int(match[3]))
        self._link: Connection | None = None
        self._lock = threading.Lock()
        self._fidelity: Fidelity | None = None

    def _connect(self) -> Connection:
        link = (Connection.pipe(self.name, self.command) if self.command is not None
                else Connection.tcp(self.name, self._host, self._port, load_token()))  # fmt: skip
        found: Fidelity = link.greeting["fidelity"]
        if self._fidelity is not None and found != self._fidelity:
            link.close()
            raise DeviceError(f"{self.name}: was of fidelity {self._fidelity} and is now {found}; another device answers there")
        self._fidelity = found
        return link

    @contextlib.contextmanager
    def _conversation(self) -> Iterator[Connection]:
        """The standing connection; a broken one is dropped, and made anew at the next call."""
        with self._lock:
            if self._link is None:
                self._link = self._connect()
            try:
                yield self._link
            except DeviceError:
                self._link.close()
                self._link = None
                raise

    @property
    def fidelity(self) -> Fidelity:
        """As the agent says. Raises DeviceError where it cannot be asked."""
        if self._fidelity is None:
            with self._conversation():
                pass
        assert self._fidelity is not None
        return self._fidelity

    def greeting(self) -> dict[str, Any]:
        """What the agent said of its device: fingerprint, drivers, version."""
        with self._conversation() as link:
            return link.greeting

    def run(self, task: Task, job: str, fence: int = 0, lease_s: float = 0.0) -> Answer:
        """Never raises DeviceError: a silent, broken or nonsensical agent is the answer's status and reason."""
        try:
            return self._run(task, job, fence, lease_s)
        except DeviceError as error:
            return Answer(status=error.status, device=self.name, fidelity=self._fidelity or "device", reason=str(error),
                          started=error.began)  # fmt: skip

    def _run(self, task: Task, job: str, fence: int, lease_s: float) -> Answer:
        request, gate = task.request, task.gate
        limit = request.timeout_s + task.rest_s + MARGIN_S + (gate.max_wait_s if gate.max_c is not None else 0.0)
        began: float | None = None
        with self._conversation() as link:
            try:
                model = link.put(request.model)
                began, clock = time.time(), time.monotonic()
                found = link.ask(
                    "measure", limit, job=job, lease=lease_s, fence=fence, model=model, prompt_tokens=[request.prompt_tokens],
                    gen_tokens=request.decode_tokens, threads=request.threads, cores=list(request.cores), warmup=task.warmup,
                    repeats=request.repeats, rest_s=task.rest_s, timeout_s=request.timeout_s, kv=request.kv, expect=task.expect,
                    bandwidth=request.bandwidth,
                    gate={"max_c": gate.max_c, "max_wait_s": gate.max_wait_s, "throttle_c": gate.throttle_c},
                )  # fmt: skip
                if found.get("error") == "busy":
                    return Answer(status="contended", device=self.name, fidelity=link.greeting["fidelity"],
                                  reason=f"the agent is busy {str(found.get('reason'))[:200]}")  # fmt: skip
                answer = parse_answer(found, self.name, link.greeting["fidelity"])
            except AnswerError as error:
                raise _began(DeviceError(str(error)), began) from None
            except DeviceError as error:
                raise _began(error, began) from None
            except ValueError as error:
                return Answer(status="unsupported", device=self.name, fidelity=link.greeting["fidelity"], reason=str(error))
        took, claimed = time.monotonic() - clock, sum(float(sample["ttft_ms"]) / 1e3 for sample in answer.samples)
        if answer.fidelity in ("device", "host") and claimed > took + 1.0:
            raise _began(DeviceError(f"{self.name}: says that it timed {claimed:.1f} s within {took:.1f} s"), began)
        if answer.status == "ok" and task.expect is not None and answer.output_hash not in (None, task.expect):
            words = f"{self.name}: its output has the checksum {answer.output_hash}, expected {task.expect}"
            raise _began(BadOutput(words), began)
        return answer

    def measure(self, request: MeasureRequest) -> Measurement:
        """As Device has it: the program's own numbers. Raises DeviceError, ValueError."""
        answer = self.run(Task(request=request, warmup=0), job=f"measure-{time.time_ns()}")
        if answer.status == "unsupported":
            raise ValueError(f"{self.name}: {answer.reason}")
        if answer.status in ("crashed", "oom"):
            raise DeviceCrash(answer.reason, answer.exit_code or 1, answer.log)
        if answer.status == "timeout":
            raise DeviceTimeout(answer.reason)
        if not answer.measurement:
            raise DeviceError(answer.reason or f"{self.name}: {answer.status}")
        return answer.measurement

    def heartbeat(self, job: str) -> bool:
        """Whether the agent is measuring that job; on a connection of its own, since the other one waits for the answer."""
        if self.command is not None:
            return False
        try:
            link = self._connect()
        except DeviceError:
            return False
        try:
            return link.ask("status", job=job).get("state") == "running"
        except DeviceError:
            return False
        finally:
            link.close()

    def cancel(self, job: str) -> bool:
        """Stop that job where it runs. Raises DeviceError."""
        link = self._connect()
        try:
            return link.ask("cancel", job=job).get("cancelled") is True
        finally:
            link.close()

    def alive(self) -> bool:
        try:
            with self._conversation() as link:
                return "state" in link.ask("status")
        except DeviceError:
            return False

    def close(self) -> None:
        with self._lock:
            if self._link is not None:
                self._link.close()
                self._link = None


def _began(error: DeviceError, when: float | None) -> DeviceError:
    error.began = when
    return error
