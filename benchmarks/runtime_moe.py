"""A mixture of experts in the runtime against the machine's limits, our dense 1B model and llama.cpp.

    python benchmarks/runtime_moe.py                              # MobileMoE-S, about ten minutes on one core
    python benchmarks/runtime_moe.py --rounds 5 --peer-python ENV/bin/python --clock cpu

Random weights whose routers spread tokens over all experts (how many had some is printed). The dense model is
MobileLLM-Pro's shape: nearly as many parameters as the mixture, all of them active. llama.cpp gets Q4_0 in its architecture
nearest to MobileMoE; what differs is in `_gguf_moe.py`. fp16 caches, as many threads on both sides; each contender runs in a
process of its own, the rounds in alternating order; a figure is the median of its rounds, a ratio the median of the rounds'
ratios. The bandwidth share is of the bytes of weights that one token needs: of 60 experts, four.

--clock cpu counts processor time on both sides: for one thread, on a machine that others use too. llama.cpp needs
`llama-cpp-python` and `gguf` in the environment of --peer-python (default: this one). Before anything is timed, the tests that
hold the experts to their reference must pass.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

from benchmarks import train_step  # noqa: E402
from benchmarks.runtime import GGUF_SIZES, run, verdict  # noqa: E402

TESTS = ("tests/kernels/test_runtime_moe.py", "tests/kernels/test_check.py", "tests/kernels/test_packed_moe.py")
PROMPTS = (128, 512)
DENSE = "mobilellm_pro_1b"
# (key, contender) -> least ratio, all to be met at every length of prompt
AIMS = {("prefill", "llama.cpp"): 4.5, ("decode", "llama.cpp"): 1.5, ("prefill", DENSE): 1.8, ("decode", DENSE): 2.2}
BANDWIDTH_AIM = 0.7


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", default="mobilemoe_s")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--decode-tokens", type=int, default=48)
    parser.add_argument("--clock", default="wall", choices=["wall", "cpu"])
    parser.add_argument("--peer-python", default=sys.executable, metavar="PYTHON")
    parser.add_argument("--output", type=Path, help="also write every result to this JSON file")
    options = parser.parse_args()
    if options.clock == "cpu" and options.threads != 1:
        parser.error("--clock cpu: processor time adds up over threads; use --threads 1")
    train_step.TESTS = TESTS  # type: ignore[misc]
    train_step.require_green()
    peer = subprocess.run([options.peer_python, "-c", "import llama_cpp, gguf"], capture_output=True).returncode == 0
    with tempfile.TemporaryDirectory(prefix="runtime_moe_") as folder:
        results = measure(Path(folder), options, peer)
    lines = [f"{key}: {value}" for key, value in train_step.conditions().items()]
    lines.append(f"{options.family}, {options.threads} thread(s), {options.rounds} rounds, {options.decode_tokens} decoded "
                 f"tokens, cache f16, {options.clock} time")
    lines += report(results, options)
    if not peer:
        lines.append(f"llama.cpp: not run, {options.peer_python} has no llama_cpp and gguf")
    sys.stdout.write("\n".join(lines) + "\n")
    if options.output:
        options.output.write_text(json.dumps({"conditions": train_step.conditions(), "results": results}, indent=1))
    return 0


def measure(folder: Path, options: argparse.Namespace, peer: bool) -> dict[int, list[dict[str, Any]]]:
    """{prompt tokens: one {"ours": ..., DENSE: ..., "llama.cpp": ...} a round}."""
    from kernels.runtime import executable_path
    from modeling.families import family
    from stages.random_packed import full_attention, write_pocket

    config = family(options.family)
    files = {"ours": folder / "moe.pocket", DENSE: folder / "dense.pocket", "llama.cpp": folder / "moe.gguf"}
    write_pocket(config, files["ours"])
    write_pocket(full_attention(family(DENSE)), files[DENSE])
    if peer:
        assert config.moe is not None
        sizes = {name: getattr(config, name) for name in GGUF_SIZES} | {
            "num_layers": config.num_layers, "moe": dataclasses.asdict(config.moe),
        }  # fmt: skip
        writer = [options.peer_python, str(ROOT / "benchmarks" / "_gguf_moe.py")]
        run([*writer, str(files["llama.cpp"]), json.dumps(sizes)])

    def command(name: str, prompt: int) -> list[str]:
        if name == "llama.cpp":
            numbers = [str(n) for n in (prompt, options.decode_tokens, 3, options.threads)]
            script = str(ROOT / "benchmarks" / "_llama_cpp.py")
            return [options.peer_python, script, str(files[name]), *numbers, *(["cpu"] if options.clock == "cpu" else [])]
        return [str(executable_path()), str(files[name]), "--prompt-tokens", str(prompt), "--decode-tokens",
                str(options.decode_tokens), "--repeats", "3", "--threads", str(options.threads), "--clock", options.clock]

    names = ["ours", DENSE, *(["llama.cpp"] if peer else [])]
    rounds: dict[int, list[dict[str, Any]]] = {}
    for prompt in PROMPTS:
        rounds[prompt] = []
        for number in range(options.rounds):
            order = names if number % 2 == 0 else names[::-1]
            rounds[prompt].append({name: json.loads(run(command(name, prompt))) for name in order})
            train_step.note(f"{prompt} tokens, round {number + 1} of {options.rounds}")
    return rounds


def report(rounds: dict[int, list[dict[str, Any]]], options: argparse.Namespace) -> list[str]:
    first = rounds[PROMPTS[0]][0]["ours"]
    moe, threads = first["moe"], options.threads
    size, active = first["weight_bytes"] / 1e6, first["decode_bytes"] / 1e6
    lines = [f"  {size:.0f} MB, of which a token needs {active:.0f} MB; {first['isa']}"]
    for prompt, done in rounds.items():
        for phase in ("prefill", "decode"):
            key = f"{phase}_tokens_per_second"
            ours = [item["ours"][key] for item in done]
            preposition = "of" if phase == "prefill" else "after"
            lines.append(f"  {phase} {preposition} {prompt}: {statistics.median(ours):.1f} tokens/s")
            for name in (DENSE, "llama.cpp"):
                if name not in done[0]:
                    continue
                ratios = [item["ours"][key] / item[name][key] for item in done]
                theirs, middle = statistics.median(item[name][key] for item in done), statistics.median(ratios)
                lines.append(f"    {name:<18}{theirs:>8.1f}   ratio {middle:.2f} ({min(ratios):.2f}..{max(ratios):.2f})"
                             f"{verdict(middle, AIMS[phase, name] if threads == 1 else None)}")  # fmt: skip
        share, dense_share = (
            statistics.median(item[name]["decode_share_of_bandwidth"] for item in done) for name in ("ours", DENSE)
        )
        lines.append(f"    decode reads active weights at {share:.0%} of the calibrated bandwidth"
                     f"{verdict(share, BANDWIDTH_AIM)}; the dense model {dense_share:.0%}")
        rate, dense_rate = (statistics.median(product_rate(item[name]) for item in done) for name in ("ours", DENSE))
        lines.append(f"    prefill's products run at {rate:.0%} of the INT8 peak; the dense model's at {dense_rate:.0%}")
        used = [sum(hits > 0 for hits in layer) for layer in done[0]["ours"]["moe"]["hits"]]
        lines.append(f"    {min(used)} to {max(used)} of {moe['num_experts']} experts of a layer had tokens; "
                     f"{done[0]['ours']['moe']['prefill_expert_bytes'] / 1e6:.0f} MB of them read in a prefill")
    return lines


def product_rate(found: dict[str, Any]) -> float:
    """Of the limit that the same process measured; 0 where the variant has no such measure."""
    peak: float = found["int8_peak"]
    return found["prefill_int8_operations_per_second"] / peak if peak else 0.0


if __name__ == "__main__":
    sys.exit(main())
