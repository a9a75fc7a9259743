"""A supernet as the source of quality: trained once on all architectures, asked for each without training any further.

Cheaper a candidate than cutting it from a backbone and training it on, and further from the truth (docs/pruning.md compares).
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from launch.search_quality import SupernetQuality, held_out_set
from launch.sweep_config import SweepRecipe
from stages.errors import InputError

if TYPE_CHECKING:
    from data_pipeline.prepare import PreparedStage
    from data_pipeline.tokenizer import Tokenizer
    from modeling.config import ModelConfig

FOLDER = "supernet"


def prepare_supernet(sweep: SweepRecipe, directory: Path, say: Callable[[str], None]) -> Path:
    """The folder of the trained supernet; trains it, in this process, where it is not there yet."""
    from modeling.supernet import Supernet
    from stages.supernet import load_supernet, save_supernet, train_supernet

    folder, quality = directory / FOLDER, sweep.quality
    if (folder / "supernet.json").is_file():
        load_supernet(folder)
        return folder
    stage, (tokenizer, data) = sweep.recipe.pretrain, _data(sweep, directory)
    assert stage is not None
    say(f"training the supernet, {quality.supernet_steps} steps of 4 architectures each")
    space = sweep.make_space()
    from dataclasses import replace

    supernet = Supernet(_largest(sweep), quality.routing)
    supernet.init_weights(sweep.seed)

    def draw(generator: random.Random) -> ModelConfig:
        return space.to_config(space.sample(generator, 1)[0])

    smallest = min((draw(random.Random(seed)) for seed in range(64)), key=lambda config: config.num_params())
    train_supernet(supernet, smallest, draw, replace(stage, steps=quality.supernet_steps), data, seed=sweep.seed)
    save_supernet(supernet, folder, tokens=quality.supernet_steps * stage.global_batch * stage.seq_len, tokenizer=tokenizer)
    return folder


def supernet_quality(sweep: SweepRecipe, folder: Path) -> SupernetQuality:
    """What scores candidates: held-out loss with the supernet's weights."""
    from data_pipeline.held_out import held_out_texts

    stage, item = sweep.recipe.pretrain, held_out_set(sweep.recipe, "pretrain", sweep.quality.held_out)
    assert stage is not None
    sources = tuple(source for source in stage.data.sources if source.name in item.sources)
    texts = held_out_texts(sources, item.max_documents, sweep.recipe.held_out_fraction())
    heads = tuple(text.encode()[: item.max_document_bytes].decode(errors="ignore") for text in texts)
    return SupernetQuality(supernet=str(folder), texts=heads)


def extract_pick(sweep: SweepRecipe, directory: Path, config: ModelConfig, output: Path) -> Path:
    """The candidate's weights out of the supernet, as a checkpoint; returns it."""
    from stages.supernet import load_supernet, write_extracted

    supernet, tokenizer, tokens = load_supernet(directory / FOLDER)
    _, data = _data(sweep, directory)
    return write_extracted(supernet, config, tokenizer, output, data=data, tokens=tokens)


def _largest(sweep: SweepRecipe) -> ModelConfig:
    from dataclasses import replace

    return replace(sweep.recipe.model, attention=(), block_repeat=1)


def _data(sweep: SweepRecipe, directory: Path) -> tuple[Tokenizer, PreparedStage]:
    from data_pipeline.prepare import ensure_tokenizer, prepare_stage

    stage, cache = sweep.recipe.pretrain, directory / FOLDER / "data"
    if stage is None:
        raise InputError("quality.source supernet needs the recipe's pretrain stage, whose data trains it; add the stage")
    tokenizer = ensure_tokenizer(sweep.recipe.tokenizer, stage.data, cache, sweep.seed)
    return tokenizer, prepare_stage(stage.data, tokenizer, stage.seq_len, cache, sweep.seed)
