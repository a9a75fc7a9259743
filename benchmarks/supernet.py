"""Does a supernet rank candidates as training from scratch does: plain sharing against routed mixtures?

    python benchmarks/supernet.py --folder DIR        # the --folder of benchmarks/prune_ranking.py, whose losses are reused

Three supernets of the same largest model are trained on the same rows, each step on the largest, the smallest and two random
architectures: plain sharing, layer-wise and neuron-wise mixtures of two experts. Printed for each: Kendall's tau between the
candidates' held-out loss with the supernet's weights and after training from scratch (and its standard error over candidates),
the mean loss of the candidates, its gap to that from scratch, and the loss of the largest and the smallest architecture.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

from benchmarks import train_step  # noqa: E402

TESTS = ("tests/stages/test_supernet.py", "tests/launch/test_search_quality.py")
ROUTINGS = ("plain", "layer", "neuron")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--candidates", type=int, default=20)
    parser.add_argument("--scratch-steps", type=int, default=600)
    parser.add_argument("--steps", type=int, default=600, help="of each supernet")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="keep everything here; default: a temporary folder")
    options = parser.parse_args()
    train_step.TESTS = TESTS  # type: ignore[misc]
    train_step.require_green()
    with tempfile.TemporaryDirectory(prefix="supernet_") as temporary:
        lines = measure(options.folder or Path(temporary), options)
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


def measure(folder: Path, options: argparse.Namespace) -> list[str]:
    from benchmarks import _prune_setup as tiny
    from benchmarks._prune_tables import jackknife
    from data_pipeline.held_out import held_out_texts
    from data_pipeline.prepare import ensure_tokenizer, prepare_stage
    from launch.search_quality import PrunedTraining, SupernetQuality
    from modeling.supernet import Supernet
    from search.quality import kendall_tau
    from stages.supernet import save_supernet, train_supernet

    recipe = tiny.tiny_recipe(options.threads)
    stage, item = recipe.pretrain, recipe.train.held_out[0]
    assert stage is not None
    cache = folder / "trials" / "data"
    candidates = tiny.draw_candidates(options.candidates, options.seed)
    scratch = PrunedTraining(recipe=recipe, backbone="", folder=str(folder / "trials"))
    losses = [scratch(c, options.scratch_steps * tiny.STEP_TOKENS, options.seed).loss for c in candidates]
    tokenizer = ensure_tokenizer(recipe.tokenizer, stage.data, cache, options.seed)
    data = prepare_stage(stage.data, tokenizer, stage.seq_len, cache, options.seed)
    texts = held_out_texts(stage.data.sources, item.max_documents, stage.data.held_out_fraction)
    heads = tuple(text.encode()[: item.max_document_bytes].decode(errors="ignore") for text in texts)
    smallest = replace(tiny.BACKBONE, num_layers=2, hidden_size=32, ffn_size=64, num_heads=2, num_kv_heads=1)

    def draw(generator: random.Random):  # type: ignore[no-untyped-def]
        return tiny.draw_candidates(1, generator.randrange(2**31))[0]

    lines = [f"{key}: {value}" for key, value in train_step.conditions().items()]
    lines += ["", f"{options.steps} steps of 4 architectures, {options.candidates} candidates against "
                  f"{options.scratch_steps} steps from scratch, mean loss {statistics.mean(losses):.3f}",
                  "  routing    tau          loss    gap largest smallest seconds"]  # fmt: skip
    for routing in ROUTINGS:
        clock = time.perf_counter()
        supernet = Supernet(tiny.BACKBONE, routing)  # type: ignore[arg-type]
        supernet.init_weights(options.seed)
        train_supernet(supernet, smallest, draw, replace(stage, steps=options.steps), data, seed=options.seed)
        seconds = time.perf_counter() - clock
        saved = folder / f"supernet-{routing}"
        save_supernet(supernet, saved, tokens=options.steps * tiny.STEP_TOKENS, tokenizer=tokenizer)
        quality = SupernetQuality(supernet=str(saved), texts=heads)
        found = [quality(candidate, 0, 0).loss for candidate in candidates]
        ends = [quality(candidate, 0, 0).loss for candidate in (tiny.BACKBONE, smallest)]
        gap = statistics.mean(one - other for one, other in zip(found, losses, strict=True))
        lines.append(f"  {routing:<8}{kendall_tau(found, losses):>6.2f} ({jackknife(found, losses):.2f})"
                     f"{statistics.mean(found):>8.3f}{gap:>7.3f}{ends[0]:>8.3f}{ends[1]:>9.3f}{seconds:>8.0f}")
        train_step.note(lines[-1])
    return lines


if __name__ == "__main__":
    sys.exit(main())
