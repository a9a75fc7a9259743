"""Serve a device to searches elsewhere: they send packed models and get measurements.

A search opens it as `--device agent://HOST:PORT`, with the token in POCKETFORGE_AGENT_TOKEN or in the file that
POCKETFORGE_AGENT_TOKEN_FILE names. Without a token file or variable here a token is made, and printed once. The default
address is this machine's alone; what comes from another one is not encrypted, so reach it through `ssh -L`.
`--listen stdio` speaks through standard input and output instead, for `ssh HOST python launch/agent.py --listen stdio`.
"""

from __future__ import annotations

import logging
import re
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the root in place of launch/, whose names would hide others

from launch.cli import Parser, run  # noqa: E402
from stages.errors import InputError, RunError  # noqa: E402

CACHE_GB = 8.0


def main() -> None:
    parser = Parser(__doc__, recipe=False)
    parser.add_argument("--device", metavar="D", default="local", help="as launch/measure.py has it (default local)")
    parser.add_argument("--listen", metavar="HOST:PORT", default="127.0.0.1:7411",
                        help="or stdio; port 0 takes a free one (default 127.0.0.1:7411)")
    parser.add_argument("--token-file", metavar="F", type=Path, help="holds the token; made where it is not there")
    parser.add_argument("--cache", metavar="DIR", type=Path, default=Path.home() / ".cache" / "pocketforge" / "agent")
    parser.add_argument("--cache-gb", metavar="G", type=float, default=CACHE_GB, help=f"most of it (default {CACHE_GB:g})")
    options, _ = parser.parse()
    if not 0 < options.cache_gb < 1e6:
        raise InputError(f"--cache-gb {options.cache_gb}; expected more than 0")
    address = None if options.listen == "stdio" else _address(options.listen)
    logging.basicConfig(stream=sys.stderr, format="%(asctime)s %(message)s", level=logging.INFO)
    from filelock import FileLock, Timeout

    options.cache.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        with FileLock(options.cache / ".lock", timeout=0):
            _serve(options.device, address, options.token_file, options.cache, options.cache_gb)
    except Timeout:
        raise InputError(f"--cache {options.cache} is another agent's; give this one its own") from None


def _serve(spec: str, address: tuple[str, int] | None, token_file: Path | None, cache: Path, cache_gb: float) -> None:
    from search.agent.cache import ContentCache
    from search.agent.server import Agent, TcpServer
    from search.devices import open_device

    if spec.startswith("agent://"):
        raise InputError(f"--device {spec}: an agent serves a device, not another agent")
    try:
        device = open_device(spec)
    except ValueError as error:
        raise InputError(str(error)) from None
    token = None if address is None else _token(token_file)
    agent = Agent(device, ContentCache(cache, int(cache_gb * 1e9)), token)
    if address is None:
        agent.serve(sys.stdin.buffer, sys.stdout.buffer)
        return
    try:
        server = TcpServer(address, agent)
    except OSError as error:
        raise RunError(f"--listen {address[0]}:{address[1]}: {error.strerror or error}; take another address or port") from None
    with server:
        host, port = server.server_address[:2]
        shown = f"[{host!s}]" if ":" in str(host) else str(host)
        sys.stdout.write(f"agent://{shown}:{port} serves {device.name} ({device.fidelity})\n")
        sys.stdout.flush()
        server.serve_forever(poll_interval=0.2)


def _address(text: str) -> tuple[str, int]:
    match = re.fullmatch(r"(?:\[([0-9a-fA-F:]+)\]|([\w.-]+)):(\d{1,5})", text)
    if match is None or int(match[3]) > 65535:
        raise InputError(f"--listen {text}: expected HOST:PORT, such as 127.0.0.1:7411, or stdio")
    return match[1] or match[2], int(match[3])


def _token(file: Path | None) -> str:
    from search.agent.token import load_token, make_token

    found = load_token(file)
    if found is None:
        found = make_token(file)
        sys.stdout.write(f"token {found}\n")  # once, to whoever starts the agent, and to no log
    return found


if __name__ == "__main__":
    run(main)
