"""What a stage is given, and what it finds on disk. All that can be refused is refused here, before anything starts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from data_pipeline.config import HeldOutConfig, SourceConfig, TokenizerConfig
from data_pipeline.tokenizer import Tokenizer
from modeling.config import ModelConfig
from modeling.decoder import Decoder
from modeling.moe_config import MoEConfig
from quant.apply import prepare
from quant.spec import QuantSpec
from stages.checkpoint import committed, latest, read_document, resolve
from stages.config import STAGES, CheckpointConfig, ParallelConfig, StageConfig, StageName, TrainConfig
from stages.distributed import Process, on_first
from stages.errors import CheckpointError, InputError
from stages.kinds import StageKind, stage_model
from stages.lineage import Lineage
from stages.midtrain import MIDTRAIN
from stages.parallel.mesh import check_world
from stages.pretrain import PRETRAIN
from stages.qat import QAT
from stages.sft import SFT
from stages.state import RunState, read_model, read_tokenizer

KINDS: dict[StageName, StageKind] = {kind.name: kind for kind in (PRETRAIN, MIDTRAIN, SFT, QAT)}


@dataclass(frozen=True, kw_only=True)
class StageJob:
    """All that one stage needs to know; plain data, so that it travels to any worker."""

    stage: StageName
    config: StageConfig
    train: TrainConfig
    model: ModelConfig
    tokenizer: TokenizerConfig
    parallel: ParallelConfig
    checkpoint: CheckpointConfig
    output_dir: str
    """The run directory; the stage's own folder is below it."""
    cache_dir: str
    init_from: str | None
    """Run, stage or checkpoint folder to start from; None starts from random weights."""
    resume: bool
    run_name: str
    recipe_hash: str
    wandb_mode: str
    wandb_project: str = "pocketforge"
    held_out: tuple[tuple[HeldOutConfig, tuple[SourceConfig, ...]], ...] = ()
    held_out_fraction: float = 0.01

    @property
    def folder(self) -> Path:
        return Path(self.output_dir) / self.stage

    @property
    def seed(self) -> int:
        """Of this stage's order of data: two stages over the same data see it in different orders."""
        return self.train.seed * len(STAGES) + STAGES.index(self.stage)


@dataclass(frozen=True, kw_only=True)
class StageResult:
    """What a stage left behind."""

    stage: StageName
    step: int
    checkpoint: Path
    skipped: bool
    """It was complete already."""


@dataclass(frozen=True, kw_only=True)
class Start:
    """What a stage starts from, read from disk by rank 0 and checked."""

    resumed: Path | None
    """Checkpoint of this stage to go on from."""
    state: RunState | None
    parent: Path | None
    """Checkpoint that the stage started from; None also where a resumed stage's parent is no longer there."""
    parent_name: str | None
    """The parent as the lineage names it, which stays when the checkpoint itself is gone."""
    parent_tokens: int
    """Tokens trained on before this stage."""
    parent_model: ModelConfig | None
    parent_quant: QuantSpec | None
    model: ModelConfig

    @property
    def step(self) -> int:
        return 0 if self.state is None else self.state.step


def check_job(job: StageJob, process: Process) -> None:
    """Raises InputError, or QuantError, for what can be seen without reading data or weights."""
    config, name = job.config, job.stage
    KINDS[name].check(config, job.init_from)
    check_world(job.parallel, process.world)
    if config.global_batch % process.world:
        raise InputError(
            f"{name}.global_batch={config.global_batch} over {process.world} workers: expected a multiple of the "
            f"number of workers; change {name}.global_batch or launch.workers"
        )
    if job.train.log_every < 1:
        raise InputError(f"train.log_every={job.train.log_every}; expected at least 1")
    if job.parallel.expert > 1:
        check_world(job.parallel, process.world, job.model)
    model = stage_model(config, replace(job.model, max_positions=max(job.model.max_positions, config.max_positions or 0,
                                                                     0 if job.init_from is None else config.seq_len)), name)
    if config.quant is not None:
        with torch.device("meta"):
            prepare(Decoder(model), config.quant)  # QuantError where groups do not fit, before the first stage


def find_start(job: StageJob, process: Process) -> Start:
    """Where the stage stands: fresh, from a parent, or from a checkpoint of its own. Raises CheckpointError."""
    return on_first(lambda: _find_start(job), process)


def _find_start(job: StageJob) -> Start:
    if (resumed := latest(job.folder / "checkpoints")) is not None:
        return _go_on(job, resumed)
    parent = None if job.init_from is None else resolve(Path(job.init_from))
    name, tokens = (None, 0) if parent is None else (str(parent), _lineage(parent).tokens_seen)
    return _start(job, None, None, parent, name, tokens)


def _go_on(job: StageJob, resumed: Path) -> Start:
    """A resumed stage keeps the parent it once started from, whatever has been trained in the earlier stage since."""
    if not job.resume:
        raise InputError(f"{job.folder} already holds checkpoints; add --resume, or name another --output-dir")
    state, lineage = RunState.read(resumed), _lineage(resumed)
    _check_same_run(job, state, resumed)
    parent = None if lineage.parent is None else _parent_on_disk(job, Path(lineage.parent))
    return _start(job, resumed, state, parent, lineage.parent, lineage.tokens_seen - state.tokens)


def _start(
    job: StageJob, resumed: Path | None, state: RunState | None, parent: Path | None, name: str | None, tokens: int
) -> Start:
    """The models of both checkpoints read, and held against the recipe's."""
    parent_model, parent_quant = (None, None) if parent is None else read_model(parent)
    base = job.model
    for checkpoint in filter(None, (parent, resumed)):
        base, wanted = read_model(checkpoint)[0], base
        _check_same_model(wanted, base, checkpoint)
    model = stage_model(job.config, base, job.stage)
    return Start(resumed=resumed, state=state, parent=parent, parent_name=name, parent_tokens=tokens,
                 parent_model=parent_model, parent_quant=parent_quant, model=model)  # fmt: skip


def _parent_on_disk(job: StageJob, recorded: Path) -> Path | None:
    """The recorded parent, or its place in this run where the run was moved; None where it is gone."""
    moved = Path(job.output_dir, *recorded.parts[-3:])
    return next((path for path in (recorded, moved) if path in committed(path.parent)), None)


def _lineage(checkpoint: Path) -> Lineage:
    return Lineage.from_dict(read_document(checkpoint, "lineage"))


def _check_same_model(wanted: ModelConfig, found: ModelConfig, where: Path) -> None:
    """Shapes and wiring must agree; RoPE base and longest sequence may have been changed by a stage."""
    for name in ModelConfig.__dataclass_fields__:
        if name in ("rope_theta", "max_positions", "init_std"):
            continue
        expected, got = getattr(wanted, name), getattr(found, name)
        if name == "attention":
            expected, got = wanted.attention_kinds, found.attention_kinds
        if isinstance(expected, MoEConfig) and isinstance(got, MoEConfig):
            for part in MoEConfig.__dataclass_fields__:
                if getattr(expected, part) != getattr(got, part):
                    name, expected, got = f"moe.{part}", getattr(expected, part), getattr(got, part)
                    break
        if expected != got:
            raise CheckpointError(
                f"{where} is a checkpoint of another model: model.{name}={got}, the recipe has {expected}; "
                "use the recipe it was trained with, or another checkpoint"
            )


def _check_same_run(job: StageJob, state: RunState, where: Path) -> None:
    for key, wanted, found in (
        ("train.seed", job.seed, state.seed),
        (f"{job.stage}.global_batch", job.config.global_batch, state.global_batch),
    ):
        if wanted != found:
            raise CheckpointError(
                f"{where} was written with another {key} ({found}, now {wanted}), so its place in the data means "
                "nothing here; set it back, or start in another --output-dir"
            )


def find_tokenizer(job: StageJob, start: Start) -> Tokenizer:
    """The checkpoint's tokenizer where there is one (it must be the recipe's, if that names one), else the recipe's."""
    from data_pipeline.prepare import ensure_tokenizer

    source = start.resumed or start.parent
    if source is None:
        tokenizer = ensure_tokenizer(job.tokenizer, job.config.data, job.cache_dir, job.train.seed)
        where = job.tokenizer.path or "the trained tokenizer"
    else:
        tokenizer, where = read_tokenizer(source), str(source)
        if job.tokenizer.path:
            named = ensure_tokenizer(job.tokenizer, job.config.data, job.cache_dir, job.train.seed)
            if named.fingerprint != tokenizer.fingerprint:
                raise CheckpointError(
                    f"tokenizer {job.tokenizer.path} (sha256 {named.fingerprint[:12]}) is not the one that {source} "
                    f"was trained with ({tokenizer.fingerprint[:12]}); use that checkpoint's tokenizer.json"
                )
    if tokenizer.vocab_size > start.model.vocab_size:
        raise InputError(
            f"{where} has {tokenizer.vocab_size} tokens, more than model.vocab_size={start.model.vocab_size}; "
            "raise model.vocab_size or use a smaller vocabulary"
        )
    return tokenizer
