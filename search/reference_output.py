"""What a model must put out, by this machine's own runtime: a device that is fast and wrong must not win.

The runtime's kernels are equal bit for bit on every kind of processor (docs/runtime.md), so one checksum of the logits is right
everywhere, whatever the number of threads.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable
from dataclasses import replace

from search.devices.base import Device, DeviceError, MeasureRequest

log = logging.getLogger(__name__)
Expect = Callable[[MeasureRequest], str | None]
CHECKED = ("device", "emulated")
"""Fidelities of devices that compute somewhere else."""


class ReferenceOutput:
    """Callable: request -> the checksum of its output. Kept in a file beside the model, so that each is computed once."""

    def __init__(self, here: Device) -> None:
        """`here` is this machine."""
        self.here = here
        self._lock = threading.Lock()
        self._broken = ""

    def __call__(self, request: MeasureRequest) -> str | None:
        """None where this machine cannot run the model, which is said once."""
        run = f"{request.prompt_tokens}-{request.decode_tokens}-{request.kv}"
        known = request.model.with_name(f"{request.model.name}.{run}.crc")
        with self._lock:
            if known.is_file() and re.fullmatch(r"\w{1,32}", found := known.read_text(encoding="ascii").strip()):
                return found
            if self._broken:
                return None
            try:
                measured = self.here.measure(replace(request, threads=1, repeats=1, bandwidth=False, cores=()))
            except (DeviceError, ValueError) as error:
                self._broken = str(error)
                log.warning("outputs of devices are not checked: %s", error)
                return None
            beside = known.with_name(f".{known.name}.part")
            beside.write_text(str(measured["logits_crc32c"]), encoding="ascii")
            beside.replace(known)
            return str(measured["logits_crc32c"])
