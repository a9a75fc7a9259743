"""The runtime against llama.cpp and against the machine's limits, at the shapes of the families.

    python benchmarks/runtime.py                                    # five shapes, about ten minutes on one core
    python benchmarks/runtime.py --families mobilellm_125m --rounds 5 --peer-python ENV/bin/python

Random codes in Q4_0 and in our packed format, every layer with full attention and without query-key norm (llama.cpp's
Llama has no other), fp16 caches, as many threads on both sides. Each contender runs in a process of its own, the rounds
in alternating order; a figure is the median of its rounds, a ratio the median of the rounds' ratios. Limits: read
bandwidth (decode) and INT8 multiply-adds from registers alone (prefill's matrix products), measured in the same process.

llama.cpp needs `llama-cpp-python` and `gguf` in the environment of --peer-python (default: this one). Before anything is
timed, the tests that hold the kernels to their reference must pass.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

from benchmarks import train_step  # noqa: E402

FAMILIES = ("mobilellm_125m", "mobilellm_350m", "mobilellm_flash_650m", "mobilellm_r1_950m", "mobilellm_pro_1b")
PROMPTS = (128, 512)
TESTS = ("tests/kernels/test_runtime.py", "tests/kernels/test_check.py", "tests/kernels/test_packed_layout.py")
GGUF_SIZES = ("vocab_size", "hidden_size", "num_executed_layers", "num_heads", "num_kv_heads", "head_dim", "ffn_size",
              "query_size", "kv_size", "norm_eps", "rope_theta", "max_positions", "tie_embeddings")  # fmt: skip
BANDWIDTH_AIM = {"mobilellm_125m": 0.7, "mobilellm_pro_1b": 0.8, "mobilellm_r1_950m": 0.8}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", default=",".join(FAMILIES), help="comma-separated (default: all five shapes)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--decode-tokens", type=int, default=48)
    parser.add_argument("--kv", default="f16", choices=["f32", "f16", "int8"], help="our cache; llama.cpp's is f16")
    parser.add_argument("--peer-python", default=sys.executable, metavar="PYTHON")
    parser.add_argument("--long", type=int, default=0, metavar="TOKENS", help="also decode after so many, with an INT8 cache: "
                        "the share of the bandwidth that reading weights and cache takes (minutes at 1B)")
    parser.add_argument("--output", type=Path, help="also write every result to this JSON file")
    options = parser.parse_args()
    train_step.TESTS = TESTS  # type: ignore[misc]
    train_step.require_green()
    peer = subprocess.run([options.peer_python, "-c", "import llama_cpp, gguf"], capture_output=True).returncode == 0
    lines = [f"{key}: {value}" for key, value in train_step.conditions().items()]
    alone: list[str] = []
    lines.append(f"{options.threads} thread(s), {options.rounds} rounds, {options.decode_tokens} decoded tokens, "
                 f"cache {options.kv}")
    results = {}
    for family in options.families.split(","):
        with tempfile.TemporaryDirectory(prefix="runtime_") as folder:
            results[family] = measure(family, Path(folder), options, peer)
            alone = measure_alone(Path(folder) / "model.pocket", options)
        lines += report(family, results[family])
        lines += alone
        train_step.note("\n".join(lines[-8:]))
    if not peer:
        lines.append(f"llama.cpp: not run, {options.peer_python} has no llama_cpp and gguf")
    sys.stdout.write("\n".join(lines) + "\n")
    if options.output:
        options.output.write_text(json.dumps({"conditions": train_step.conditions(), "results": results}, indent=1))
    return 0


def measure(family: str, folder: Path, options: argparse.Namespace, peer: bool) -> dict[int, list[dict[str, Any]]]:
    """{prompt tokens: one {"ours": ..., "llama.cpp": ...} a round}."""
    from modeling.families import FAMILIES as KNOWN
    from stages.random_packed import full_attention, write_pocket

    config = full_attention(KNOWN[family])
    pocket, gguf = folder / "model.pocket", folder / "model.gguf"
    write_pocket(config, pocket)
    if peer:
        sizes = {name: getattr(config, name) for name in GGUF_SIZES}
        run([options.peer_python, str(ROOT / "benchmarks" / "_gguf.py"), str(gguf), json.dumps(sizes)])
    from kernels.runtime import executable_path

    rounds: dict[int, list[dict[str, Any]]] = {}
    for prompt in PROMPTS:
        rounds[prompt] = []
        for number in range(options.rounds):
            ours = [str(executable_path()), str(pocket), "--prompt-tokens", str(prompt), "--decode-tokens",
                    str(options.decode_tokens), "--repeats", "3", "--threads", str(options.threads), "--kv", options.kv]
            theirs = [options.peer_python, str(ROOT / "benchmarks" / "_llama_cpp.py"), str(gguf), str(prompt),
                      str(options.decode_tokens), "3", str(options.threads)]
            contenders = {"ours": ours, **({"llama.cpp": theirs} if peer else {})}
            order = list(contenders) if number % 2 == 0 else list(reversed(contenders))
            rounds[prompt].append({name: json.loads(run(contenders[name])) for name in order})
    return rounds


def measure_alone(pocket: Path, options: argparse.Namespace) -> list[str]:
    """Lines on what no peer is asked for: a process's first token, and a long context."""
    from kernels.runtime import executable_path

    first = [str(executable_path()), str(pocket), "--ids", "1,2,3", "--decode-tokens", "1", "--threads", str(options.threads)]
    times = []
    for _ in range(options.rounds + 1):  # the first one brings the file into the page cache
        begin = time.perf_counter()
        run(first)
        times.append(time.perf_counter() - begin)
    first_token = statistics.median(times[1:])
    aim = "reached" if first_token <= 0.5 else "missed"
    lines = [f"  a new process has its first token after {first_token:.3f} s, aim at most 0.5: {aim}"]
    if options.long:
        command = [str(executable_path()), str(pocket), "--prompt-tokens", str(options.long), "--decode-tokens", "16",
                   "--repeats", "1", "--threads", str(options.threads), "--kv", "int8"]  # fmt: skip
        found = json.loads(run(command))
        lines.append(f"  decode after {options.long:,}, INT8 cache: {found['decode_tokens_per_second']:.1f} tokens/s, "
                     f"{found['decode_kv_bytes'] / 1e6:.0f} MB of cache and {found['decode_bytes'] / 1e6:.0f} MB of weights "
                     f"a token, {found['decode_share_with_cache']:.0%} of the bandwidth")  # fmt: skip
    return lines


def run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, env=train_step.environment())
    if done.returncode:
        sys.exit(f"{done.stderr[-2000:]}\nno figures: {command[0]} ended with {done.returncode}")
    return done.stdout


def report(family: str, rounds: dict[int, list[dict[str, Any]]]) -> list[str]:
    """Lines of one family."""
    first = rounds[PROMPTS[0]][0]["ours"]
    held, peak = (first["weight_bytes"] + first["kv_bytes"]) / 2**20, first["peak_memory_bytes"] / 2**20
    memory = "reached" if peak <= held + 64 else "missed"
    lines = ["", f"{family}: {first['weight_bytes'] / 1e6:.1f} MB, {first['isa']}, load {first['load_seconds']:.3f} s, peak "
                 f"memory {peak:.0f} MiB (weights and cache {held:.0f}; aim at most 64 more: {memory})"]
    for prompt, done in rounds.items():
        lines.append(compare(f"prefill of {prompt}", "prefill_tokens_per_second", done, 2.0))
        lines.append(compare(f"decode after {prompt}", "decode_tokens_per_second", done, 1.25))
    share = statistics.median(item["ours"]["decode_share_of_bandwidth"] for item in rounds[PROMPTS[0]])
    lines.append(f"  decode reads {share:.0%} of the calibrated bandwidth{verdict(share, BANDWIDTH_AIM.get(family))}")
    peaks = [item["ours"]["prefill_int8_operations_per_second"] / item["ours"]["int8_peak"] for done in rounds.values()
             for item in done if item["ours"]["int8_peak"]]  # fmt: skip
    if peaks:
        middle = statistics.median(peaks)
        lines.append(f"  prefill's products run at {middle:.0%} of the INT8 peak{verdict(middle, 0.55)}")
    return lines


def compare(label: str, key: str, done: list[dict[str, Any]], aim: float) -> str:
    """One line: our median, theirs, and the median of the rounds' ratios."""
    text = f"  {label:<18}{statistics.median(item['ours'][key] for item in done):>9.1f} tokens/s"
    if "llama.cpp" not in done[0]:
        return text
    ratios = [item["ours"][key] / item["llama.cpp"][key] for item in done]
    middle = statistics.median(ratios)
    theirs = statistics.median(item["llama.cpp"][key] for item in done)
    return (f"{text}   llama.cpp {theirs:>8.1f}   ratio {middle:.2f} ({min(ratios):.2f}..{max(ratios):.2f})"
            f"{verdict(middle, aim)}")  # fmt: skip


def verdict(value: float, aim: float | None) -> str:
    if aim is None:
        return ""
    return f", aim {aim:g}: {'reached' if value >= aim else 'missed'}"


if __name__ == "__main__":
    sys.exit(main())
