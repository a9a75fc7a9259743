"""A simulated sweep whose service, agents and workers are killed with -9 at random: does it come to the same end?

    python -m benchmarks.search_chaos --trials 200 --kills 20 --output chaos.json
    python -m benchmarks.search_chaos --loop sweep --trials 200 --kills 20

Two agents (processes on loopback, each with a simulated device), a service (process) and its two scoring workers (processes)
do the sweep twice: undisturbed, and with kills. `--loop service` (the default) has the service alone, with an optimizer that
every answer moves; `--loop sweep` the whole search: latency stage, staged optimizer, short and full scores, confirmation.
Exit status 1 where a trial did not end exactly once, where an accepted result differs, where the optimizer was told anything
else or in another order, or where the front differs. Needs no accelerator; minutes on 2 cores.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._chaos_outcome import compare, outcome
from modeling.config import ModelConfig
from search.agent.cache import ContentCache
from search.agent.client import AgentDevice
from search.agent.server import Agent, TcpServer
from search.agent.token import TOKEN_VARIABLE
from search.devices.base import MeasureRequest
from search.farm import Farm
from search.jobs import JobQueue
from search.members import Member, Policy
from search.records import TERMINAL, Job, Results
from search.service import Measure, Service
from search.simulated import Faults, SimulatedDevice, write_shape
from search.store import Store
from search.workers import ProcessScorer

ROOT = Path(__file__).resolve().parent.parent
TOKEN = "chaos-needs-no-secret"
BASE = ModelConfig(vocab_size=4096, hidden_size=256, num_layers=4, num_heads=8, num_kv_heads=4, ffn_size=1024, head_dim=32)
LAYERS, FFN = tuple(range(2, 13)), tuple(range(512, 4097, 64))
POLICY = Policy(retry_s=0.05, heartbeat_s=0.5, reconnect_s=0.2, reconnects=50, backoff_s=(0.5,) * 60, cool_s=0.1)


def score(candidate: Mapping[str, Any]) -> Mapping[str, float]:
    """A loss that falls with size, by a law with a seeded scatter; one candidate in forty diverges."""
    time.sleep(0.05)
    key = int(hashlib.sha256(json.dumps(dict(candidate), sort_keys=True).encode()).hexdigest()[:8], 16)
    size = candidate["num_layers"] * candidate["ffn_size"]
    return {"loss": float("nan") if key % 40 == 7 else 2.0 + 30.0 / size**0.5 + 0.05 * (key % 1000) / 1000}


class ChaosPlan:
    """Two numbers of a candidate: depth and feed-forward width."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def key(self, config: Mapping[str, Any]) -> str:
        return f"{config['num_layers']}x{config['ffn_size']}"

    def measures(self, config: Mapping[str, Any]) -> Sequence[Measure]:
        path = write_shape(replace(BASE, **config), self.folder / f"{self.key(config)}.json")
        request = MeasureRequest(model=path, prompt_tokens=64, decode_tokens=8, timeout_s=10.0)
        return [Measure(name="short", request=request), Measure(name="long", request=replace(request, prompt_tokens=512))]

    def results(self, measured: Mapping[str, Job], scores: Results) -> tuple[Results, Results]:
        times = {f"ttft_ms_{name}": (job.results or {})["ttft_ms"] for name, job in measured.items()}
        return {**scores, **times}, {}


class Evolution:
    """Mutates members of the front so far: what it asks depends on every answer and on their order, so order shows."""

    def __init__(self) -> None:
        self.asked = 0
        self.told: list[tuple[dict[str, int], list[float] | None]] = []

    def ask(self, n: int) -> Sequence[tuple[Any, Mapping[str, Any]]]:
        made: list[tuple[Any, Mapping[str, Any]]] = []
        for _ in range(n):
            draw = np.random.default_rng([self.asked, len(self.told)])
            parents = self._front() if self.asked >= 16 else []
            candidate = dict(parents[draw.integers(len(parents))]) if parents else {}
            for name, values in (("num_layers", LAYERS), ("ffn_size", FFN)):
                if not parents or draw.random() < 0.6:
                    candidate[name] = int(draw.choice(values))
            made.append((candidate, candidate))
            self.asked += 1
        return made

    def tell(self, token: Any, results: Results | None, noise: Results) -> None:
        self.told.append((token, None if results is None else [results["loss"], results["ttft_ms_long"]]))

    def _front(self) -> list[dict[str, int]]:
        good = [(candidate, values) for candidate, values in self.told if values is not None]
        return [candidate for candidate, mine in good
                if not any(other[0] <= mine[0] and other[1] <= mine[1] and other != mine for _, other in good)]  # fmt: skip

    def state(self) -> str:
        return json.dumps([self.asked, self.told])

    def load(self, state: str) -> None:
        asked, told = json.loads(state)
        self.asked, self.told = asked, [(candidate, values) for candidate, values in told]


def agent_process(port: int, folder: Path) -> None:
    device = SimulatedDevice("simulated", faults=Faults(crash=0.03), real_s=0.03)
    with TcpServer(("127.0.0.1", port), Agent(device, ContentCache(folder, 10 << 20), TOKEN)) as server:
        server.serve_forever(poll_interval=0.05)


def service_process(folder: Path, ports: Sequence[int], trials: int, loop: str) -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    members = [Member(AgentDevice(f"127.0.0.1:{port}")) for port in ports]
    while not all(member.alive() for member in members):  # an agent that starts, or was just killed
        time.sleep(0.1)
    if loop == "sweep":
        from benchmarks._chaos_sweep import sweep_process

        return sweep_process(folder, members, POLICY, trials)
    plan = ChaosPlan(folder)
    sentinel = plan.measures({"num_layers": 4, "ffn_size": 1024})[0].request
    scorers = [ProcessScorer("benchmarks.search_chaos:score") for _ in range(2)]
    with Store.open(folder / "search.sqlite", {"trials": trials}) as store:
        farm = Farm(store, members, policy=POLICY, sentinel=sentinel)
        Service(store, farm, Evolution(), plan, trials=trials, scorers=scorers).run()


class Circus:
    """The processes of one sweep."""

    def __init__(self, folder: Path, trials: int, agents: int = 2, loop: str = "service") -> None:
        folder.mkdir(parents=True)
        self.folder, self.trials, self.loop = folder, trials, loop
        self.ports = [_free_port() for _ in range(agents)]
        self.agents = [self._start_agent(port) for port in self.ports]
        self.service = self._start_service()

    def _start(self, *arguments: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "benchmarks.search_chaos", *arguments]
        environment = {**os.environ, TOKEN_VARIABLE: TOKEN, "OMP_NUM_THREADS": "1"}
        with (self.folder / "log").open("ab") as log:
            return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, env=environment)

    def _start_agent(self, port: int) -> subprocess.Popen[bytes]:
        return self._start("agent", str(port), str(self.folder / f"agent-{port}"))

    def _start_service(self) -> subprocess.Popen[bytes]:
        return self._start("service", str(self.folder), ",".join(map(str, self.ports)), str(self.trials), self.loop)

    def done(self) -> int:
        """Measurements and scores that have ended."""
        if not (self.folder / "search.sqlite").exists():
            return 0
        try:
            with Store.read(self.folder / "search.sqlite") as store:
                return len(JobQueue(store).jobs(*TERMINAL))
        except ValueError:
            return 0  # just being made

    def kill(self, draw: random.Random) -> str:
        """Kill one process with -9 and start it again, unless its service does so itself."""
        import psutil

        victim = draw.choice(["service", "agent", "worker"])
        if victim == "worker":
            try:
                children = psutil.Process(self.service.pid).children()
                workers = [child for child in children if "search.workers" in child.cmdline()]
                draw.choice(workers).send_signal(signal.SIGKILL)
            except (psutil.Error, IndexError):
                return ""  # just started, or just ended
        elif victim == "agent":
            place = draw.randrange(len(self.agents))
            self.agents[place].kill()
            self.agents[place].wait()
            time.sleep(draw.uniform(0.0, 0.3))
            self.agents[place] = self._start_agent(self.ports[place])
        else:
            self.service.kill()
            self.service.wait()
            self.service = self._start_service()
        return victim

    def play(self, kills: int = 0, seed: int = 0, limit_s: float = 900.0, jobs: int = 0) -> list[str]:
        """Run to the end, with that many kills spread over its `jobs`. Raises RuntimeError."""
        draw, killed, deadline = random.Random(seed), [], time.monotonic() + limit_s
        points = sorted(draw.uniform(0.0, 0.9) * jobs for _ in range(kills))
        try:
            while self.service.poll() is None:
                if time.monotonic() > deadline:
                    raise RuntimeError(f"{self.done()} jobs have ended after {limit_s:g} s; see {self.folder / 'log'}")
                if points and self.done() >= points[0]:
                    time.sleep(draw.uniform(0.0, 0.2))
                    if self.service.poll() is None and (victim := self.kill(draw)):
                        killed.append(victim)
                        points.pop(0)
                time.sleep(0.05)
            if self.service.returncode:
                raise RuntimeError(f"the service ended with status {self.service.returncode}; see {self.folder / 'log'}")
        finally:
            for process in (self.service, *self.agents):
                process.kill()
                process.wait()
        return killed


def chaos(folder: Path, trials: int, kills: int, seed: int, limit_s: float, loop: str = "service") -> dict[str, Any]:
    """Both sweeps; `wrong` is empty where they came to the same end."""
    Circus(folder / "calm", trials, loop=loop).play(limit_s=limit_s)
    calm, start = outcome(folder / "calm", loop), time.monotonic()
    killed = Circus(folder / "wild", trials, loop=loop).play(kills, seed, limit_s, calm["jobs"])
    wild = outcome(folder / "wild", loop)
    states = [trial[2] for trial in wild["trials"]]
    counted = {name: len(wild[name]) for name in ("front", "confirmed", "short") if name in wild}
    return {
        "loop": loop, "trials": trials, "jobs": wild["jobs"],
        "states": {state: states.count(state) for state in sorted(set(states))},
        "kills": {victim: killed.count(victim) for victim in sorted(set(killed))},
        "seconds": round(time.monotonic() - start, 1), "put_back": wild["put_back"],
        "late_answers": wild["late_answers"], **counted, "wrong": compare(calm, wild),
    }  # fmt: skip


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def main() -> None:
    if sys.argv[1:2] == ["agent"]:
        return agent_process(int(sys.argv[2]), Path(sys.argv[3]))
    if sys.argv[1:2] == ["service"]:
        folder, ports, trials, loop = sys.argv[2:]
        return service_process(Path(folder), [int(port) for port in ports.split(",")], int(trials), loop)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--loop", choices=["service", "sweep"], default="service")
    parser.add_argument("--limit-s", type=float, default=900.0)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = chaos(Path(folder), options.trials, options.kills, options.seed, options.limit_s, options.loop)
    text = json.dumps(found, indent=2)
    print(text)
    if options.output is not None:
        options.output.write_text(text + "\n")
    sys.exit(1 if found["wrong"] else 0)


if __name__ == "__main__":
    main()
