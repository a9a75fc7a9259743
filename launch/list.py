"""List recipes and model families: parameters, FLOPs a token, weight and KV-cache bytes."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the root in place of launch/, whose names would hide others

from launch.cli import Parser, run  # noqa: E402


def main() -> None:
    parser = Parser(__doc__, recipe=False)
    parser.add_argument("--context", type=int, default=2048, metavar="N", help="tokens for FLOPs and KV cache")
    parser.add_argument("--json", action="store_true", help="numbers for a script")
    parser.add_argument("--recipe", help=argparse_suppress())
    parser.add_argument("--output-dir", help=argparse_suppress())
    options, _ = parser.parse()
    rows = table_rows(options.context)
    if options.json:
        import json

        sys.stdout.write(json.dumps(rows, indent=2) + "\n")
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"families, at a context of {options.context} tokens")
    for heading in ("family", "layers", "hidden", "heads/kv", "params", "active", "MFLOPs/token", "INT4 MB", "bf16 MB",
                    "KV MB (int8)"):
        table.add_column(heading, justify="left" if heading == "family" else "right", no_wrap=True)
    for row in rows["families"]:
        table.add_row(
            row["name"], row["layers"], str(row["hidden"]), row["heads"], f"{row['params']:,}", f"{row['active_params']:,}",
            f"{row['flops_per_token'] / 1e6:,.0f}", f"{row['int4_bytes'] / 1e6:,.1f}", f"{row['bf16_bytes'] / 1e6:,.1f}",
            f"{row['kv_bytes'] / 1e6:,.1f}",
        )  # fmt: skip
    Console(width=None if sys.stdout.isatty() else 150).print(table)
    recipes = Table(title="recipes")
    for heading in ("recipe", "stages", "tokens", "params", "what"):
        recipes.add_column(heading)
    for row in rows["recipes"]:
        recipes.add_row(row["name"], " ".join(row["stages"]), f"{row['tokens']:.3g}", f"{row['params']:,}", row["what"])
    Console(width=None if sys.stdout.isatty() else 150).print(recipes)


def argparse_suppress() -> str:
    import argparse

    return argparse.SUPPRESS


def table_rows(context: int) -> dict[str, list[dict]]:
    from launch.recipes import RECIPES
    from modeling.families import FAMILIES

    families = [
        {
            "name": name,
            "layers": str(config.num_layers) + (f"x{config.block_repeat}" if config.block_repeat > 1 else ""),
            "hidden": config.hidden_size,
            "heads": f"{config.num_heads}/{config.num_kv_heads}",
            "params": config.num_params(),
            "active_params": config.num_active_params(),
            "flops_per_token": config.flops_per_token(context),
            "int4_bytes": config.weight_bytes(4, 32),
            "bf16_bytes": config.weight_bytes(16),
            "kv_bytes": config.kv_bytes(context, 8),
        }
        for name, config in FAMILIES.items()
    ]
    recipes = []
    for name, make in RECIPES.items():
        recipe = make()
        stages = recipe.stages()
        recipes.append({
            "name": name,
            "stages": list(stages),
            "tokens": sum(stage.steps * stage.global_batch * stage.seq_len for stage in stages.values()),
            "params": recipe.model.num_params(),
            "what": (make.__doc__ or "").strip().splitlines()[0],
        })
    return {"families": families, "recipes": recipes}


if __name__ == "__main__":
    run(main)
