"""Importance on disk, beside the run it is of: `importance/KEY.safetensors` with `KEY.json`, never pickled.

KEY is a hash of the checkpoint's commit, the data's fingerprint and how much of it was read: the same question finds its
answer, another one does not. The JSON is renamed into place last and holds the tensors' SHA-256.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from data_pipeline.config import DataConfig
from data_pipeline.loader import BatchLoader
from data_pipeline.prepare import PreparedStage, prepare_stage
from modeling.config import ModelConfig
from stages.checkpoint import resolve
from stages.checkpoint_files import COMMIT, file_entry, file_hash, write_durably
from stages.distributed import Process, on_first
from stages.errors import CheckpointError, InputError
from stages.importance import Scores, calibrate

logger = logging.getLogger(__name__)

VERSION = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibration:
    """How much text a calibration pass reads."""

    sequences: int = 64
    """Rows, over all workers."""
    seq_len: int = 256
    """Tokens a row."""
    micro_batch: int = 8
    """Rows a forward pass on one worker."""
    drop_batches: int = 1
    """Of those, how many measure the loss without each block; 0 leaves `loss` layer scores out."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("sequences", 1), ("seq_len", 1), ("micro_batch", 1), ("drop_batches", 0), ("seed", 0)):
            if getattr(self, name) < least:
                raise InputError(f"calibration {name}={getattr(self, name)}; expected at least {least}")


def calibrate_checkpoint(
    run: str | Path, data: DataConfig, options: Calibration, cache_dir: str | Path, process: Process | None = None
) -> Path:
    """Scores of a run's (or stage's, or checkpoint's) last weights on the training part of `data`; returns the JSON's path.

    What was computed before is found and not computed again. Every rank reads its share of the rows.

    Raises:
        InputError: options or text that do not fit the model, a quantized checkpoint. CheckpointError, DataError: damaged.
    """
    from stages.loading import load_model

    process = Process() if process is None else process
    checkpoint = on_first(lambda: resolve(run), process)
    loaded = load_model(checkpoint, process.device)
    if loaded.quant is not None:
        raise InputError(f"{checkpoint} is quantization-aware; calibrate the checkpoint before qat, whose weights are real")
    if options.seq_len > loaded.context:
        raise InputError(f"calibration seq_len={options.seq_len} is longer than the model's {loaded.context} positions; "
                         "lower it")  # fmt: skip
    prepared = prepare_stage(data, loaded.tokenizer, options.seq_len, cache_dir, options.seed)
    key = _key(checkpoint, prepared, options)
    path = importance_folder(checkpoint) / f"{key}.json"
    if on_first(path.is_file, process):
        logger.info("importance of %s was calibrated before: %s", checkpoint, path)
        return path
    steps = -(-options.sequences // (options.micro_batch * process.world))
    rows = options.micro_batch * process.world
    loader = BatchLoader(prepared, seed=options.seed, global_batch=rows, rank=process.rank, world=process.world)
    batches = (batch for step in range(steps) for batch in loader.build_step(step * rows))
    try:
        scores = calibrate(loaded.model, batches, process, drop_batches=options.drop_batches, seed=options.seed)
    except ValueError as error:
        raise InputError(f"{checkpoint}: {error}") from None
    about = {"checkpoint": str(checkpoint), "commit_sha256": file_hash(checkpoint / COMMIT),
             "data_fingerprint": prepared.fingerprint, "calibration": dataclasses.asdict(options)}  # fmt: skip
    on_first(lambda: save_scores(scores, path, about), process)
    return path


def importance_folder(checkpoint: Path) -> Path:
    """Where the importance of a checkpoint lies: in its stage's folder."""
    stage = checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else checkpoint.parent
    return stage / "importance"


def _key(checkpoint: Path, prepared: PreparedStage, options: Calibration) -> str:
    parts = [VERSION, file_hash(checkpoint / COMMIT), prepared.fingerprint, dataclasses.asdict(options)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def save_scores(scores: Scores, path: Path, about: dict[str, Any]) -> None:
    """Write `path` (ending in .json) and its tensors beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = path.with_suffix(".safetensors")
    beside = path.with_name(f".{tensors.name}.part")
    save_file({name: tensor.contiguous() for name, tensor in scores.tensors.items()}, beside)
    beside.replace(tensors)
    document = {"version": VERSION, **about, "loss": scores.loss, "tokens": scores.tokens,
                "model": dataclasses.asdict(scores.config), "tensors": {"file": tensors.name, **file_entry(tensors)}}
    beside = path.with_name(f".{path.name}.part")
    write_durably(beside, json.dumps(document, indent=1).encode())
    beside.replace(path)


def load_scores(path: str | Path) -> tuple[Scores, dict[str, Any]]:
    """Scores and the whole JSON document. Raises CheckpointError for what is damaged, by name."""
    path = Path(path)
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        config, entry = ModelConfig.from_plain(document["model"]), document["tensors"]
        file = path.with_name(Path(entry["file"]).name)
        loss, tokens = float(document["loss"]), int(document["tokens"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} is no importance of ours ({type(error).__name__}: {error}); expected the JSON that a "
                              "calibration wrote") from None  # fmt: skip
    if not file.is_file() or file_entry(file) != {"bytes": entry.get("bytes"), "sha256": entry.get("sha256")}:
        raise CheckpointError(f"{file} is missing or not what was written; remove {path} and calibrate again")
    try:
        tensors = load_file(file)
    except SafetensorError as error:
        raise CheckpointError(f"{file} cannot be read ({error}); remove {path} and calibrate again") from None
    return Scores(config=config, tensors=tensors, loss=loss, tokens=tokens), document
