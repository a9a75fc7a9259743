"""Cut a smaller model out of a trained run: the recipe's `model`, with the run's most important parts inherited.

    python launch/prune.py --from runs/backbone --recipe quickstart --model.num_layers 6 --model.ffn_size 256 --output DIR
    python launch/pretrain.py --recipe DIR/recipe.toml --init-from DIR --output-dir runs/pruned

A calibration pass over the recipe's text scores the run's parts once, and is kept beside the run. DIR gets a checkpoint that
any stage starts from, and recipe.toml, with which training goes on; --distill W lets the run teach it (W: weight of KL).
--output-tokens N trims the head to the N tokens that the recipe's last text asks for most (Llama Guard 3-1B-INT4).
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the root in place of launch/, whose names would hide others

from launch.cli import Parser, run  # noqa: E402
from launch.config import Recipe, load_recipe, save_toml  # noqa: E402
from launch.rundir import check_output  # noqa: E402
from stages.config import DistillConfig, StageConfig, StageName  # noqa: E402
from stages.errors import InputError  # noqa: E402

VARIANTS = ("wanda", "energy", "magnitude", "taylor", "weights", "random")


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--from", dest="backbone", type=Path, metavar="RUN_OR_CHECKPOINT", required=True)
    parser.add_argument("--output", type=Path, metavar="DIR", required=True)
    parser.add_argument("--scores", choices=VARIANTS, default="wanda", help="of channels and heads (default wanda)")
    parser.add_argument("--layers", choices=["cosine", "loss"], default="cosine", help="score of blocks (default cosine)")
    parser.add_argument("--share", choices=["first", "best", "mean"], default="first", help="weights of a shared block")
    parser.add_argument("--calibration-sequences", type=int, default=64, metavar="N", help="rows of text (default 64)")
    parser.add_argument("--importance", type=Path, metavar="F.json", help="of an earlier calibration of this checkpoint")
    parser.add_argument("--output-tokens", type=int, metavar="N", help="keep only so many tokens in the head")
    parser.add_argument("--distill", type=float, metavar="W", help="recipe.toml learns from the run: W KL + (1 - W) CE")
    options, overrides = parser.parse()
    if options.output_dir is not None:
        raise InputError("--output-dir is for runs; name the folder of the pruned checkpoint with --output")
    recipe = load_recipe(options.recipe, overrides)
    if options.distill is not None and not 0 < options.distill <= 1:
        raise InputError(f"--distill {options.distill}; expected a weight above 0 and at most 1")
    if options.output_tokens is not None and options.output_tokens < 1:
        raise InputError(f"--output-tokens {options.output_tokens}; expected at least 1")
    check_output(options.output)
    checkpoint = _backbone(options.backbone, recipe)
    if options.output_tokens is not None:
        recipe = _trim_head(checkpoint, recipe, options.output_tokens)
    importance = options.importance or calibrate(checkpoint, recipe, options.calibration_sequences)
    _prune(checkpoint, importance, recipe, options)


def _backbone(path: Path, recipe: Recipe) -> Path:
    """The checkpoint, seen to cover the recipe's model before minutes go into calibration."""
    from modeling.prune import uncovered
    from stages.checkpoint import resolve
    from stages.prune import inherit_positions
    from stages.state import read_model

    checkpoint = resolve(path)
    backbone, _ = read_model(checkpoint)
    if problems := uncovered(backbone, inherit_positions(recipe.model, backbone)):
        raise InputError(f"--from {path} does not cover the recipe's model: {'; '.join(problems)}")
    return checkpoint


def _trim_head(checkpoint: Path, recipe: Recipe, count: int) -> Recipe:
    """The recipe with a head that says what its last stage before qat is supervised on."""
    from data_pipeline.chat import end_of_turn_id
    from data_pipeline.prepare import prepare_stage
    from stages.output_tokens import frequent_outputs
    from stages.state import read_tokenizer

    stages = [stage for name, stage in recipe.stages().items() if name != "qat"]
    if not stages:
        raise InputError(f"recipe {recipe.name} has no stage before qat, so nothing says which tokens the head needs")
    stage, tokenizer = stages[-1], read_tokenizer(checkpoint)
    data = prepare_stage(stage.data, tokenizer, stage.seq_len, _cache(checkpoint), recipe.train.seed)
    always = (end_of_turn_id(tokenizer),) if stage.data.kind == "chat" else ()
    chosen = frequent_outputs(data, recipe.model.vocab_size, count, always=always)
    sys.stderr.write(f"the head keeps {len(chosen.ids)} of {recipe.model.vocab_size} tokens, {chosen.coverage:.2%} of what the "
                     "text asks for\n")  # fmt: skip
    return replace(recipe, model=replace(recipe.model, tie_embeddings=False, output_tokens=chosen.ids))


def _cache(checkpoint: Path) -> Path:
    """The run's own cache where it has one, for its text is tokenised there already."""
    from stages.importance_file import importance_folder

    used = checkpoint.parents[2] / "data"
    return used if used.is_dir() else importance_folder(checkpoint) / "data"


def calibrate(checkpoint: Path, recipe: Recipe, sequences: int) -> Path:
    """The importance of a checkpoint on the text of the recipe's stage that made it; found where it was computed before."""
    from stages.checkpoint import read_document
    from stages.distributed import init_process
    from stages.importance_file import Calibration, calibrate_checkpoint

    stage = calibration_stage(recipe, str(read_document(checkpoint, "lineage").get("stage")))
    from stages.state import read_model

    seq_len = min(stage.seq_len, read_model(checkpoint)[0].max_positions)
    micro_batch = max(1, min(sequences, 4096 // seq_len))
    options = Calibration(sequences=sequences, seq_len=seq_len, micro_batch=micro_batch, seed=recipe.train.seed)
    return calibrate_checkpoint(checkpoint, stage.data, options, _cache(checkpoint), init_process())


def calibration_stage(recipe: Recipe, trained_in: str) -> StageConfig:
    """The stage whose text calibrates: that of the checkpoint where the recipe has it, else the first one with text."""
    stages: dict[StageName, StageConfig] = recipe.stages()
    for name, stage in stages.items():
        if name == trained_in:
            return stage
    texts = [stage for stage in stages.values() if stage.data.kind == "text"] or list(stages.values())
    if not texts:
        raise InputError(f"recipe {recipe.name} has no stage, so no text to calibrate on; give it at least pretrain")
    return texts[0]


def _prune(checkpoint: Path, importance: Path, recipe: Recipe, options: argparse.Namespace) -> None:
    from stages.prune import PruneOptions, prune_checkpoint
    from stages.state import read_model

    choices = PruneOptions(variant=options.scores, layers=options.layers, share=options.share)
    pruned = prune_checkpoint(checkpoint, importance, recipe.model, options.output, choices)
    model, _ = read_model(pruned)
    backbone, _ = read_model(checkpoint)
    recipe = replace(recipe, model=model)
    if options.distill is not None:
        teacher = DistillConfig(teacher=str(checkpoint.resolve()), weight=options.distill)
        stage = next(name for name in recipe.stages() if name != "qat")
        taught: dict[str, Any] = {stage: replace(recipe.stages()[stage], distill=teacher)}
        recipe = replace(recipe, **taught)
    save_toml(recipe, options.output / "recipe.toml")
    sys.stderr.write(f"wrote {options.output}: {model.num_params():,} of {backbone.num_params():,} parameters\n")


if __name__ == "__main__":
    run(main)
