"""Design models by MobileMoE's scaling law, and fit the law to runs of your own.

    python launch/scaling_law.py design --memory 5GB --train-flops 5e20 --token-flops 1e9 --context 8192 [--law F.json]
    python launch/scaling_law.py fit --runs DIR_OR_JSONL --output law.json
    python launch/scaling_law.py plot --output F.html [--law law.json] [--runs DIR_OR_JSONL]
    python launch/scaling_law.py ladder --output-dir runs/scaling-law      tiny models, trained, fitted, plotted; it resumes

Each takes --help. Without --law the constants are the published ones, which hold for 0.3 to 0.9 billion active parameters and
100 to 500 billion tokens; a design outside of what its law was fitted to says so (docs/scaling-law.md).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the root in place of launch/, whose names would hide others

from launch.cli import Parser, run  # noqa: E402
from launch.quantities import amount, names, size, whole_numbers  # noqa: E402
from stages.errors import InputError, RunError  # noqa: E402

if TYPE_CHECKING:
    from argparse import Namespace

    from search.scaling_files import Run
    from search.scaling_law import Choice, ScalingLaw

VERBS = ("design", "fit", "plot", "ladder")


def main() -> None:
    if sys.argv[1:2] and sys.argv[1] in VERBS:
        verbs = {"design": _design, "fit": _fit, "plot": _plot, "ladder": _ladder}
        verbs[sys.argv[1]](sys.argv[2:])
        return
    parser = Parser(__doc__, recipe=False)
    parser.add_argument("verb", choices=VERBS, help="design, fit, plot or ladder")
    parser.parse()


def _design(argv: list[str]) -> None:
    parser = Parser("Choose a model by the law, within caps.", recipe=False)
    parser.add_argument("--memory", type=size, metavar="BYTES", help="weights and cache, such as 5GB or 700MiB")
    parser.add_argument("--train-flops", type=amount, metavar="F", help="6 N D of the training, such as 5e20")
    parser.add_argument("--token-flops", type=amount, metavar="F", help="2 N of a token's forward pass, such as 1e9")
    parser.add_argument("--attention", action="store_true", help="--token-flops counts attention to the context, too")
    parser.add_argument("--tokens", type=amount, metavar="D", help="train on so many, such as 300B; else what the FLOPs allow")
    parser.add_argument("--context", type=int, default=8192, metavar="T", help="tokens in the cache (default 8192)")
    parser.add_argument("--law", type=Path, metavar="F.json", help="a fitted law (default: the published constants)")
    parser.add_argument("--inside", action="store_true", help="only where the law was fitted")
    parser.add_argument("--experts", type=whole_numbers, metavar="E,E", help="how many times more experts than a token uses")
    parser.add_argument("--cut", type=names, metavar="X,X", help="how experts are cut: g8+shared, g8, g4 ...")
    parser.add_argument("--kv-heads", type=whole_numbers, default=(4,), metavar="K,K", help="each is tried (default 4)")
    parser.add_argument("--vocab", type=int, metavar="V", help="default 128256, or the recipe's")
    parser.add_argument("--weight-bits", type=int, choices=(4, 8, 16), default=4)
    parser.add_argument("--kv-bits", type=int, choices=(8, 16, 32), default=8)
    parser.add_argument("--recipe", metavar="NAME_OR_FILE", help="--output is that recipe with the design in it")
    parser.add_argument("--output", type=Path, metavar="F.toml|F.json", help="the best design: a [model] table, or everything")
    options, _ = parser.parse(argv)
    from launch.config import load_recipe
    from launch.rundir import check_output
    from launch.scaling_text import print_designs, save_design
    from search.scaling_design import designs
    from search.scaling_shapes import Caps, Rules

    if options.train_flops is None and options.tokens is None:
        raise InputError("the law needs to know how long is trained; give --train-flops F or --tokens D")
    if options.output is not None:
        if options.output.suffix not in (".toml", ".json"):
            raise InputError(f"--output {options.output}; expected a name that ends in .toml or .json")
        check_output(options.output)
    recipe = load_recipe(options.recipe, {}) if options.recipe else None
    if recipe is not None and (options.output is None or options.output.suffix != ".toml"):
        raise InputError("--recipe says what to write the design into; add --output F.toml")
    law = _law(options.law)
    caps = Caps(memory_bytes=options.memory, token_flops=options.token_flops, train_flops=options.train_flops,
                tokens=options.tokens, context=options.context, attention=options.attention, weight_bits=options.weight_bits,
                group_size=32 if options.weight_bits < 16 else None, kv_bits=options.kv_bits)  # fmt: skip
    vocabulary = options.vocab if options.vocab is not None else recipe.model.vocab_size if recipe else 128_256
    rules = Rules(vocab_size=vocabulary, kv_heads=options.kv_heads, choices=_choices(options.cut), inside=options.inside)
    if options.experts is not None:
        from dataclasses import replace

        rules = replace(rules, experts=options.experts)
    found = designs(law, caps, rules)
    print_designs(found, law)
    if options.output is not None:
        save_design(found[0], law, recipe, options.output)
        _say(f"design: {options.output}")


def _fit(argv: list[str]) -> None:
    parser = Parser("Fit the law to runs.", recipe=False)
    parser.add_argument("--runs", type=Path, required=True, metavar="DIR_OR_JSONL", help="runs.jsonl, or a folder with some")
    parser.add_argument("--output", type=Path, required=True, metavar="F.json")
    parser.add_argument("--prior", default="auto", metavar="P",
                        help="published, weak, none or a law's JSON; default: published where runs lie in its range, else weak")
    parser.add_argument("--bootstraps", type=int, default=200, metavar="K", help="for intervals (default 200)")
    parser.add_argument("--without-embedding", action="store_true", help="N leaves the embedding out")
    parser.add_argument("--seed", type=int, default=0)
    options, _ = parser.parse(argv)
    from launch.rundir import check_output
    from search.scaling_files import read_runs

    _check_numbers(options)
    check_output(options.output)
    _fit_and_save(options.runs, read_runs(options.runs), options)


def _check_numbers(options: Namespace) -> None:
    for name in ("bootstraps", "seed"):
        if not 0 <= getattr(options, name) < 2**31:
            raise InputError(f"--{name} {getattr(options, name)}; expected at least 0 and below 2^31")


def _fit_and_save(source: Path, runs: list[Run], options: Namespace) -> ScalingLaw:
    from launch.rundir import write_json
    from launch.scaling_text import print_law, prior_named
    from search.scaling_files import law_to_dict
    from search.scaling_fit import fit

    _needs_scipy()
    prior, words = prior_named(options.prior, runs)
    embedding = not options.without_embedding
    law = fit(runs, prior=prior, bootstraps=options.bootstraps, seed=options.seed, with_embedding=embedding,
              provenance=f"fitted to {len(runs)} runs of {source}; prior: {words}")  # fmt: skip
    write_json(options.output, law_to_dict(law))
    print_law(law)
    _say(f"law: {options.output}")
    return law


def _plot(argv: list[str]) -> None:
    parser = Parser("Loss against active parameters, with lines of equal memory.", recipe=False)
    parser.add_argument("--output", type=Path, required=True, metavar="F.html|F.png")
    parser.add_argument("--law", type=Path, metavar="F.json", help="a fitted law (default: the published constants)")
    parser.add_argument("--runs", type=Path, metavar="DIR_OR_JSONL", help="measured points")
    parser.add_argument("--tokens", type=names, metavar="D,D", help="a panel each (default: those of the runs)")
    parser.add_argument("--vocab", type=int, metavar="V", help="for the memory of a size (default: the runs', or 128256)")
    parser.add_argument("--context", type=int, default=0, metavar="T", help="memory includes a cache of so many tokens")
    options, _ = parser.parse(argv)
    from launch.rundir import check_output
    from launch.scaling_plots import write_plot
    from search.scaling_files import read_runs

    if options.output.suffix not in (".html", ".png"):
        raise InputError(f"--output {options.output}; expected a name that ends in .html or .png")
    if options.context < 0 or (options.vocab is not None and options.vocab < 1):
        raise InputError(f"--context {options.context}, --vocab {options.vocab}; expected at least 0, and at least 1")
    tokens = [amount(text, "--tokens") for text in options.tokens or ()]
    check_output(options.output)
    runs = read_runs(options.runs) if options.runs else []
    write_plot(_law(options.law), runs, options.output, tokens=tokens, vocabulary=options.vocab, context=options.context)
    _say(f"plot: {options.output}")


def _ladder(argv: list[str]) -> None:
    parser = Parser("Train a ladder of tiny models, fit the law to them and plot it.", recipe=False)
    parser.takes_recipe = True  # with a recipe of its own where none is named
    parser.add_argument("--recipe", default="scaling_ladder", metavar="NAME_OR_FILE", help="text, batch and optimizer")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/scaling-law"), metavar="DIR")
    for name, default in (("hidden", "64,128,192"), ("experts", "1,2,4,8"), ("tokens", "100k,200k,400k")):
        parser.add_argument(f"--{name}", type=names, default=names(default), metavar="A,B", help=f"default {default}")
    parser.add_argument("--cut", type=names, default=("g8+shared",), metavar="X,X", help="default g8+shared")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--prior", default="auto", help="as for fit")
    parser.add_argument("--bootstraps", type=int, default=200, metavar="K")
    parser.add_argument("--without-embedding", action="store_true", help="N leaves the embedding out")
    options, overrides = parser.parse(argv)
    from launch.config import load_recipe
    from launch.scaling_ladder import RUNS, Ladder, climb
    from launch.scaling_plots import write_plot

    _check_numbers(options)
    _needs_scipy()
    hidden, experts, tokens = (tuple(int(amount(text, f"--{name}")) for text in getattr(options, name))
                               for name in ("hidden", "experts", "tokens"))  # fmt: skip
    recipe = load_recipe(options.recipe, overrides)
    ladder = Ladder(recipe=recipe, hidden=hidden, experts=experts, tokens=tokens, choices=_choices(options.cut) or (),
                    seed=options.seed)  # fmt: skip
    runs = climb(ladder, options.output_dir, _say)
    if not runs:
        raise RunError("no rung ended with a loss; lower pretrain.optim.lr of the recipe")
    options.output = options.output_dir / "law.json"
    law = _fit_and_save(options.output_dir / RUNS, runs, options)
    for ending in ("html", "png"):
        write_plot(law, runs, options.output_dir / f"plot.{ending}", vocabulary=recipe.model.vocab_size)
        _say(f"plot: {options.output_dir / f'plot.{ending}'}")


def _choices(texts: tuple[str, ...] | None) -> tuple[Choice, ...] | None:
    from search.scaling_law import Choice

    return None if texts is None else tuple(Choice.parse(text) for text in texts)


def _law(path: Path | None) -> ScalingLaw:
    from search.scaling_files import read_law
    from search.scaling_law import PUBLISHED

    return PUBLISHED if path is None else read_law(path)


def _needs_scipy() -> None:
    import importlib.util

    if missing := [name for name in ("scipy", "threadpoolctl") if importlib.util.find_spec(name) is None]:
        raise InputError(f"fitting needs {missing[0]}, which is not installed; pip install '.[search]'")


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")


if __name__ == "__main__":
    run(main)
