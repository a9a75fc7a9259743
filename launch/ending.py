"""What follows training: export, the packed model and its measurement, evaluation, samples, lineage."""

from __future__ import annotations

import logging
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from launch.config import EvaluationConfig, Recipe
from launch.rundir import read_json_object, write_json
from stages.config import StageName

if TYPE_CHECKING:
    from stages.loading import LoadedModel

logger = logging.getLogger(__name__)


def export_and_evaluate(recipe: Recipe, directory: Path) -> None:
    """In this process: export/hf, export/model.pocket, export/measurements.json, export/evaluation.json, samples.json,
    lineage.json.

    It is about all stages that the directory holds, also where this command ran only some of them.
    """
    from stages.checkpoint import latest, resolve
    from stages.loading import load_model

    config = recipe.evaluation
    names = [name for name in recipe.stages() if latest(directory / name / "checkpoints") is not None]
    final = resolve(directory)
    _export_all(final, directory)
    _measure(directory / "export")
    write_json(directory / "export" / "evaluation.json", _evaluate(config, load_model(final)))
    samples = [
        {"stage": name, "prompt": prompt, "text": continue_text(load_model(directory / name), prompt, config.max_new_tokens)}
        for name in names
        for prompt in config.prompts
    ]
    write_json(directory / "samples.json", samples)
    write_json(directory / "lineage.json", _lineage(directory, names))


def _export_all(final: Path, directory: Path) -> None:
    """export/hf and export/model.pocket of the final checkpoint, unless they are that already.

    Where a form cannot hold the model it is left out, and said: the rest goes on. export/source.json says of which
    checkpoint the exports are, and why one is missing; the report reads it.
    """
    folder = directory / "export"
    marker, checkpoint = folder / "source.json", str(final.relative_to(directory))
    said = read_json_object(marker)  # a damaged one says nothing: the exports are made anew
    targets: dict[str, Callable[[Path, Path], None]] = {"hf": _export_hf, "model.pocket": _export_packed}
    current = said.get("checkpoint") == checkpoint
    if current and all((folder / name).exists() for name in targets):
        return
    reasons = {}
    for name, write in targets.items():
        _remove_old(folder / name)
        try:
            write(final, folder / name)
        except Exception as error:
            reason = _reason(error)
            if reason is None:
                raise
            sys.stderr.write(f"warning: export/{name} is left out: {reason}\n")
            reasons[name] = reason
    (folder / "measurements.json").unlink(missing_ok=True)  # of the model before
    write_json(marker, {"checkpoint": checkpoint, **({"left_out": reasons} if reasons else {})})


def _export_hf(final: Path, target: Path) -> None:
    from stages.export import export_hf

    export_hf(final, target)


def _export_packed(final: Path, target: Path) -> None:
    from stages.export_packed import export_packed

    export_packed(final, target)


def _reason(error: Exception) -> str | None:
    """Why a form does not hold this model, or cannot be written here; None for a fault of another kind."""
    from kernels.runtime import RuntimeLibraryError
    from modeling.hf_convert import ConversionError
    from stages.export_packed import NotPackable

    return str(error) if isinstance(error, ConversionError | NotPackable | RuntimeLibraryError) else None


def _measure(export: Path) -> None:
    """export/measurements.json: the packed model on this machine."""
    model, target = export / "model.pocket", export / "measurements.json"
    if target.exists() or not model.exists():
        return
    from kernels.packed_file import read_metadata
    from search.devices import DeviceError, MeasureRequest, open_device

    longest = int(read_metadata(model)["model"]["max_positions"])
    prompt = max(1, min(128, longest // 2))
    request = MeasureRequest(model=model, prompt_tokens=prompt, decode_tokens=max(1, min(32, longest - prompt)), repeats=3)
    try:
        write_json(target, open_device("local").measure(request))
    except DeviceError as error:
        sys.stderr.write(f"warning: the packed model was not measured: {error}\n")


def _remove_old(target: Path) -> None:
    """An export of an older checkpoint of this same run is made anew; nothing else is ever removed."""
    if target.is_dir():
        shutil.rmtree(target)
    else:
        target.unlink(missing_ok=True)


def _evaluate(config: EvaluationConfig, loaded: LoadedModel) -> dict[str, dict[str, float]]:
    from launch.tasks import resolve_tasks, score_task

    return {task.key: score_task(loaded, task, limit=config.limit) for task in resolve_tasks(config.tasks, required=False)}


def continue_text(loaded: LoadedModel, prompt: str, max_new_tokens: int) -> str:
    """Greedy continuation. A prompt that starts with `user:` is asked as a conversation."""
    from data_pipeline.chat import render_prompt
    from modeling.generate import generate

    tokenizer = loaded.tokenizer
    if prompt.startswith("user:"):
        ids = render_prompt(tokenizer, [{"role": "user", "content": prompt.removeprefix("user:").strip()}])
    else:
        ids = [*([] if tokenizer.bos_id is None else [tokenizer.bos_id]), *tokenizer.encode(prompt)]
    stop = [token for token in (tokenizer.eos_id, tokenizer.eot_id) if token is not None]
    return tokenizer.decode(list(generate(loaded.model, ids, max_new_tokens, stop_ids=stop)))


def _lineage(directory: Path, names: list[StageName]) -> dict[str, object]:
    from stages.checkpoint import latest, read_document

    chain = []
    for name in names:
        if (checkpoint := latest(directory / name / "checkpoints")) is not None:
            entry = read_document(checkpoint, "lineage")
            chain.append({"checkpoint": str(checkpoint.relative_to(directory)), **entry})
    return {"run": directory.name, "stages": chain}
