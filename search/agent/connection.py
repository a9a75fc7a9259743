"""A conversation with an agent, over a socket or a pipe. Whatever it says or fails to say ends in words, never in a hang."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import itertools
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

from search.agent.protocol import CHUNK, MAX_ANSWER, PROTO, ProtocolError, Reader, Writer, encode, read_message
from search.devices.base import DeviceError, DeviceTimeout, Fidelity

CONNECT_S = 10.0
CALL_S = 60.0


class Connection:
    """One conversation. Not for several threads."""

    def __init__(self, name: str, reader: Reader, writer: Writer, owner: socket.socket | subprocess.Popen[bytes]) -> None:
        self.name, self._reader, self._writer, self._owner = name, reader, writer, owner
        self._marks = itertools.count(1)
        self.greeting: dict[str, Any] = {}

    @classmethod
    def tcp(cls, name: str, host: str, port: int, token: str | None) -> Connection:
        """Raises DeviceError."""
        try:
            link = socket.create_connection((host, port), CONNECT_S)
        except OSError as error:
            raise DeviceError(f"{name}: {error.strerror or error}; is launch/agent.py running there, and reachable?") from None
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return cls(name, link.makefile("rb"), link.makefile("wb"), link)._greeted(token)

    @classmethod
    def pipe(cls, name: str, command: Sequence[str]) -> Connection:
        """An agent that this process starts, `launch/agent.py --listen stdio`, perhaps through ssh. Raises DeviceError."""
        try:
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        except OSError as error:
            raise DeviceError(f"{name}: {command[0]} cannot be started ({error})") from None
        assert process.stdout is not None and process.stdin is not None
        return cls(name, process.stdout, process.stdin, process)._greeted(None)

    def _greeted(self, token: str | None) -> Connection:
        try:
            self.greeting = self.ask("hello", proto=PROTO, token=token)
            if self.greeting.get("proto") != PROTO or self.greeting.get("fidelity") not in get_args(Fidelity):
                raise DeviceError(f"{self.name}: greeted with {str(self.greeting)[:80]!r}; expected proto {PROTO} and fidelity")
        except BaseException:
            self.close()
            raise
        return self

    def ask(self, verb: str, within_s: float = CALL_S, **fields: Any) -> dict[str, Any]:
        """The answer to one request. Raises DeviceError (silent, gone, nonsense), ValueError where it refuses the request."""
        mark = next(self._marks)
        with self._limit(within_s, verb):
            self._writer.write(encode({"verb": verb, "id": mark, **fields}))
            self._writer.flush()
            while True:
                answer = read_message(self._reader, MAX_ANSWER)
                if answer is None:
                    raise DeviceError(f"{self.name}: the connection ended before an answer to {verb}")
                if answer.get("id") == mark or (verb == "hello" or "error" in answer) and "id" not in answer:
                    break
        if answer.get("error") == "unauthorized":
            raise DeviceError(f"{self.name}: {answer.get('reason')}; set POCKETFORGE_AGENT_TOKEN to what the agent printed, or "
                              "POCKETFORGE_AGENT_TOKEN_FILE to its file")  # fmt: skip
        if answer.get("error") == "malformed":
            raise ValueError(f"{self.name}: refused {verb}: {str(answer.get('reason'))[:300]}")
        return answer

    @contextlib.contextmanager
    def _limit(self, timeout_s: float, verb: str) -> Iterator[None]:
        """Turn silence, a broken link and nonsense into DeviceError. A silent pipe is cut, since it has no time limit."""
        cut = threading.Timer(timeout_s, self._cut)
        started = time.monotonic()
        cut.start()
        try:
            yield
        except ProtocolError as error:
            raise DeviceError(f"{self.name}: answered {verb} with nonsense ({error}); is that an agent?") from None
        except (OSError, ValueError) as error:
            if time.monotonic() - started < timeout_s:
                raise DeviceError(f"{self.name}: the connection broke during {verb} ({error})") from None
            raise DeviceTimeout(f"{self.name}: no answer to {verb} within {timeout_s:g} s") from None
        except DeviceError:
            if time.monotonic() - started < timeout_s:
                raise
            raise DeviceTimeout(f"{self.name}: no answer to {verb} within {timeout_s:g} s") from None
        finally:
            cut.cancel()

    def _cut(self) -> None:
        with contextlib.suppress(OSError):
            if isinstance(self._owner, socket.socket):
                self._owner.shutdown(socket.SHUT_RDWR)
            else:
                self._owner.kill()

    def put(self, path: Path) -> str:
        """Send a file that is not there yet, from where an earlier try broke off; its SHA-256."""
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            size = path.stat().st_size
            answer = self.ask("put", sha256=sha256, size=size, name=path.name)
            while not answer.get("stored"):
                held = answer.get("held")
                if not isinstance(held, int) or not 0 <= held < size:
                    raise DeviceError(f"{self.name}: says that it holds {str(held)[:20]} of {size} bytes; that is nonsense")
                file.seek(held)
                chunk = base64.b64encode(file.read(CHUNK)).decode()
                answer = self.ask("put", sha256=sha256, size=size, name=path.name, offset=held, chunk=chunk)
                if not answer.get("stored") and not (isinstance(answer.get("held"), int) and answer["held"] > held):
                    raise DeviceError(f"{self.name}: took a part of {path.name} and holds no more than before")
        return sha256

    def close(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._writer.close()
        with contextlib.suppress(OSError):
            self._reader.close()
        if isinstance(self._owner, socket.socket):
            self._owner.close()
        else:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._owner.wait(5)
            self._owner.kill()
            self._owner.wait()
