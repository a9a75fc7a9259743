"""Convert a checkpoint: `--to hf` writes a folder that `transformers` loads, `--to packed` one file for the runtime,
`--to gguf` one for llama.cpp, `--to executorch` a program (.pte) for ExecuTorch.

All but the first hold the codes and scales that quantization-aware training saw; other checkpoints are rounded to nearest.

With --recipe NAME --random-weights the untrained model of that shape is exported instead.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the root in place of launch/, whose names would hide others

from launch.cli import Parser, run  # noqa: E402
from launch.rundir import check_output, writing  # noqa: E402
from stages.errors import InputError  # noqa: E402

LAYOUTS = ["llama", "mobilellm", "llama4", "mobilemoe", "mobilemoe-int4", "mixtral", "qwen3_moe", "glm4_moe"]
"""Those of `modeling.hf_layouts`, which is not imported for --help."""


def main() -> None:
    parser = Parser(__doc__)
    for action in parser._actions:
        action.required = False  # --recipe goes with --random-weights only
    parser.add_argument("--checkpoint", type=Path, metavar="C", help="a run directory or checkpoint")
    parser.add_argument("--random-weights", action="store_true")
    parser.add_argument("--to", choices=["hf", "packed", "gguf", "executorch"], required=True)
    parser.add_argument("--output", type=Path, metavar="P", required=True)
    parser.add_argument("--layout", choices=LAYOUTS, help="of --to hf; default: the plainest that can hold it")
    parser.add_argument("--embedding", choices=["int4", "int8"], help="of --to packed; default: as training rounded it")
    options, overrides = parser.parse()
    for option, form in (("layout", "hf"), ("embedding", "packed")):
        if getattr(options, option) is not None and options.to != form:
            raise InputError(f"--{option} goes with --to {form}, not with --to {options.to}; drop it")
    if (options.checkpoint is None) == (options.recipe is None):
        raise InputError("give either --checkpoint C, or --recipe NAME --random-weights")
    check_output(options.output)
    if options.checkpoint is not None:
        if options.random_weights:
            raise InputError("--random-weights goes with --recipe, and --checkpoint has weights; drop one of the two")
        if overrides:
            raise InputError(f"--{next(iter(overrides))} changes a recipe, and --checkpoint is exported as it is; drop it")
    with writing(options.output):
        if options.checkpoint is not None:
            _export_checkpoint(options)
        else:
            _export_random(options, overrides)
    sys.stderr.write(f"wrote {options.output}\n")


def _export_checkpoint(options: argparse.Namespace) -> None:
    from stages.checkpoint import resolve

    checkpoint = resolve(options.checkpoint)
    if options.to == "packed":
        from stages.export_packed import export_packed

        export_packed(checkpoint, options.output, options.embedding)
    elif options.to == "gguf":
        from stages.export_gguf import export_gguf

        export_gguf(checkpoint, options.output)
    elif options.to == "executorch":
        from stages.export_executorch import export_executorch

        export_executorch(checkpoint, options.output)
    else:
        from stages.export import export_hf

        export_hf(checkpoint, options.output, layout=options.layout)


def _export_random(options: argparse.Namespace, overrides: dict[str, str]) -> None:
    if not options.random_weights:
        raise InputError("--recipe has no weights; add --random-weights for an untrained model, or give --checkpoint")
    from launch.config import load_recipe
    from modeling.decoder import Decoder
    from modeling.init import init_weights

    recipe = load_recipe(options.recipe, overrides)
    model = Decoder(recipe.model)
    init_weights(model, recipe.train.seed)
    if options.to == "packed":
        from stages.export_packed import pack_model

        pack_model(model.requires_grad_(False), options.output, embedding=options.embedding)
    elif options.to == "gguf":
        from stages.export_gguf import write_gguf_model

        write_gguf_model(model.requires_grad_(False), options.output)
    elif options.to == "executorch":
        from stages.export_executorch import write_executorch_model

        write_executorch_model(model.requires_grad_(False), options.output)
    else:
        from stages.export import write_hf_model

        write_hf_model(model, options.output, options.layout)


if __name__ == "__main__":
    run(main)
