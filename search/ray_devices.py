"""A device in a Ray actor: for devices that hang on another node of the cluster. Ray is imported where it is used."""

from __future__ import annotations

import json
import logging
import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from search.agent.answer import Answer, AnswerError, parse_answer
from search.agent.measuring import Task, measure
from search.devices.base import Device, DeviceError, DeviceTimeout, Fidelity, Measurement, MeasureRequest
from search.devices.catalog import open_device
from search.members import sha256

START_S = 120.0
MARGIN_S = 60.0


class _Actor:
    """Runs on the device's node: one measurement at a time, and beside it the question whether it is at it."""

    def __init__(self, spec: str) -> None:
        self.device = open_device(spec)
        self.folder = Path(tempfile.mkdtemp(prefix="pocketforge-actor-"))
        self.job = ""

    def greeting(self) -> tuple[str, Fidelity]:
        return self.device.name, self.device.fidelity

    def working(self) -> str:
        return self.job

    def has(self, digest: str) -> bool:
        return (self.folder / digest).is_file()

    def put(self, digest: str, content: bytes) -> None:
        (self.folder / f"{digest}.part").write_bytes(content)
        (self.folder / f"{digest}.part").replace(self.folder / digest)

    def run(self, task: Task, digest: str, job: str) -> str:
        """The answer as the agents' wire has it."""
        self.job = job
        try:
            request = replace(task.request, model=self.folder / digest)
            return json.dumps(measure(self.device, replace(task, request=request)).wire())
        finally:
            self.job = ""


def open_on_ray(resource: str, spec: str) -> RayDevice:
    """The device `spec` of the node that has that custom resource; of any node where `resource` is empty.

    The cluster is the one that RAY_ADDRESS names, as in a submitted job. Raises ValueError, DeviceError.
    """
    try:
        import ray
    except ImportError:
        raise ValueError(f"device ray://{resource}/{spec}: Ray is not installed; install it, or use an agent://") from None
    if not ray.is_initialized():
        if not os.environ.get("RAY_ADDRESS"):
            raise ValueError(f"device ray://{resource}/{spec}: RAY_ADDRESS names no cluster; set it to the head's address, or "
                             "start the search with ray job submit")  # fmt: skip
        try:
            ray.init(log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, RuntimeError, ValueError) as error:
            said = " ".join(str(error).split())[:200]
            raise DeviceError(f"ray://{resource}/{spec}: no cluster at {os.environ['RAY_ADDRESS']} ({said})") from None
    if resource and resource not in (have := ray.cluster_resources()):
        known = ", ".join(sorted(name for name in have if not name.startswith(("node:", "CPU", "memory", "object_store"))))
        raise ValueError(f"device ray://{resource}/{spec}: no node has a resource {resource!r}, the cluster has "
                         f"{known or 'none'}; start that node with ray start --resources '{{\"{resource}\": 1}}'")  # fmt: skip
    if resource:  # it waits for its device: what it takes of the node is that, not a core
        return RayDevice(spec, resources={resource: 1.0}, num_cpus=0.0)
    return RayDevice(spec)


class RayDevice(Device):
    """Implements search.devices.base.Device, and `Remote` for a farm.

    Args:
        spec: as `open_device` has it, opened on the node where Ray puts the actor.
        resources: custom resources that name that node, e.g. {"phone-bench": 1}.
    """

    def __init__(self, spec: str, *, resources: dict[str, float] | None = None, num_cpus: float = 1.0) -> None:
        """Starts the actor. Raises DeviceError where Ray has no room for it, ValueError for a device of no known form."""
        import ray

        open_device(spec)  # a wrong name is told here, not by a dead actor
        options = {"num_cpus": num_cpus, "resources": resources or {}, "max_concurrency": 4, "max_restarts": -1}
        self._spec, self._where = spec, "+".join(resources or {})
        self._actor = cast(Any, ray.remote(_Actor).options(**options).remote(spec))
        self._name, self._fidelity = self._get(self._actor.greeting.remote(), START_S, "the actor's start")

    @property
    def name(self) -> str:
        return f"ray:{self._where}:{self._name}" if self._where else f"ray:{self._name}"

    @property
    def fidelity(self) -> Fidelity:
        return self._fidelity

    def _get(self, reference: Any, timeout_s: float, what: str) -> Any:
        import ray

        try:
            return ray.get(reference, timeout=timeout_s)
        except ray.exceptions.GetTimeoutError:
            raise DeviceTimeout(f"ray:{self._spec}: no answer to {what} within {timeout_s:g} s") from None
        except ray.exceptions.RayError as error:
            raise DeviceError(f"ray:{self._spec}: {what} failed ({str(error).strip().splitlines()[-1][:300]})") from None

    def run(self, task: Task, job: str, fence: int, lease_s: float) -> Answer:
        """Never raises DeviceError."""
        request, gate, began = task.request, task.gate, None
        limit = request.timeout_s + task.rest_s + MARGIN_S + (gate.max_wait_s if gate.max_c is not None else 0.0)
        try:
            digest = sha256(request.model)
            if not self._get(self._actor.has.remote(digest), MARGIN_S, "has"):
                self._get(self._actor.put.remote(digest, request.model.read_bytes()), START_S, "put")
            began = time.time()
            found = self._get(self._actor.run.remote(task, digest, job), limit, "measure")
            return parse_answer({**json.loads(found), "device": self.name}, self.name, self.fidelity)
        except AnswerError as error:
            reason, status = str(error), DeviceError.status
        except DeviceError as error:
            reason, status = str(error), error.status
        return Answer(status=status, device=self.name, fidelity=self.fidelity, reason=reason, started=began)

    def measure(self, request: MeasureRequest) -> Measurement:
        answer = self.run(Task(request=request, warmup=0), "measure", 0, 0.0)
        if answer.status == "unsupported":
            raise ValueError(answer.reason)
        if not answer.measurement:
            raise DeviceError(answer.reason)
        return answer.measurement

    def heartbeat(self, job: str) -> bool:
        try:
            return self._get(self._actor.working.remote(), MARGIN_S, "heartbeat") == job
        except DeviceError:
            return False

    def alive(self) -> bool:
        try:
            self._get(self._actor.working.remote(), MARGIN_S, "alive")
            return True
        except DeviceError:
            return False
