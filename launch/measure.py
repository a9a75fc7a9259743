"""Measure a packed model on a device: prefill, decode, time to first token, memory, and where the time goes.

Devices: local; ssh://USER@HOST and adb://SERIAL (the program and the model are sent there once); qemu-aarch64[:CPU]
(correctness only, its times are left out); model:PROFILE (computed from a device profile, not measured); agent://HOST:PORT
(what launch/agent.py serves there). `--plot` draws the time of each operation.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the root in place of launch/, whose names would hide others

from launch.cli import Parser, run  # noqa: E402
from launch.rundir import check_output, write_json  # noqa: E402
from search.devices.base import Measurement  # noqa: E402
from stages.errors import InputError, RunError  # noqa: E402

WEEK = 7 * 86400
PICTURES = (".png", ".svg", ".pdf")


def main() -> None:
    parser = Parser(__doc__, recipe=False)
    parser.add_argument("--model", metavar="P", type=Path, required=True, help="a packed file, or a run that exported one")
    parser.add_argument("--device", metavar="D", default="local")
    parser.add_argument("--prompt-tokens", type=int, default=128, metavar="N")
    parser.add_argument("--decode-tokens", type=int, default=32, metavar="N")
    parser.add_argument("--threads", type=int, default=1, metavar="N")
    parser.add_argument("--repeats", type=int, default=5, metavar="N")
    parser.add_argument("--kv", choices=["f32", "f16", "int8"], default="f16", help="the key/value cache (default f16)")
    parser.add_argument("--timeout", type=float, default=600.0, metavar="S", help="seconds (default 600)")
    parser.add_argument("--output", metavar="F.json", type=Path, required=True)
    parser.add_argument("--plot", metavar="F.png", type=Path)
    options, _ = parser.parse()
    _check(options)
    from search.devices import DeviceError, MeasureRequest, open_device

    try:
        device = open_device(options.device)
        request = MeasureRequest(
            model=_packed(options.model), prompt_tokens=options.prompt_tokens, decode_tokens=options.decode_tokens,
            threads=options.threads, repeats=options.repeats, kv=options.kv, timeout_s=options.timeout,
        )  # fmt: skip
        found = device.measure(request)
    except DeviceError as error:
        raise RunError(str(error)) from None
    except ValueError as error:
        raise InputError(str(error)) from None
    write_json(options.output, found)
    if options.plot is not None:
        from launch.measure_plot import plot_operations

        plot_operations(found, options.plot)
    _show(found)


def _check(options: argparse.Namespace) -> None:
    check_output(options.output)
    if not 0 < options.timeout <= WEEK:
        raise InputError(f"--timeout {options.timeout:g}; expected more than 0 and at most {WEEK} seconds")
    if options.plot is None:
        return
    check_output(options.plot, "--plot")
    if options.plot.suffix not in PICTURES:
        raise InputError(f"--plot {options.plot}; expected a name that ends in {', '.join(PICTURES)}")
    if options.device.startswith("qemu-"):
        raise InputError(f"--plot: {options.device} gives no times of operations; drop it")


def _packed(path: Path) -> Path:
    from kernels.packed_file import is_packed

    file = path / "export" / "model.pocket" if path.is_dir() else path
    if not is_packed(file):
        raise InputError(f"--model {path}: no packed model; make one with launch/export.py --to packed")
    return file


def _show(found: Measurement) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("measurement", "value", title=f"{found['device']} ({found['fidelity']}), {found['isa']}, "
                                                f"{found['threads']} thread{'s' if found['threads'] != 1 else ''}")
    rows = {
        "prefill": (found["prefill_tokens_per_second"], "{:.1f} tokens/s"),
        "decode": (found["decode_tokens_per_second"], "{:.1f} tokens/s"),
        "time to first token": (found["time_to_first_token_ms"], "{:.1f} ms"),
        "decode's share of read bandwidth": (found.get("decode_share_of_bandwidth"), "{:.0%}"),
        "peak memory": (found["peak_memory_bytes"] / 2**20, "{:.1f} MiB"),
        "weights": (found["weight_bytes"] / 2**20, "{:.1f} MiB"),
    }
    for name, (value, form) in rows.items():
        table.add_row(name, "not timed" if value is None else form.format(value))
    Console().print(table)


if __name__ == "__main__":
    run(main)
