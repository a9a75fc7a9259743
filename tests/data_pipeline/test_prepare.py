"""From configuration to batches: caching, integrity, plans, order over workers and restarts."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from corpus_files import write_rows

from data_pipeline.config import DataConfig, SourceConfig, TokenizerConfig
from data_pipeline.errors import DataError
from data_pipeline.loader import IGNORE, Batch, BatchLoader
from data_pipeline.prepare import PreparedStage, ensure_tokenizer, prepare_stage
from data_pipeline.shards import open_shard, write_shard
from data_pipeline.sources import read_documents
from data_pipeline.tokenizer import Tokenizer

Make = Callable[..., SourceConfig]


@pytest.fixture
def data(text_source: Make) -> DataConfig:
    return DataConfig(sources=(text_source("a", weight=3.0), text_source("b", count=25, weight=1.0)))


@pytest.fixture
def stage(data: DataConfig, tokenizer: Tokenizer, tmp_path: Path) -> PreparedStage:
    return prepare_stage(data, tokenizer, 32, tmp_path / "cache", 0)


def chat_source(tmp_path: Path) -> SourceConfig:
    talks = [(f"row {i}?", "the model " * (i % 5)) for i in range(40)]
    rows = [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in talks
    ]
    return SourceConfig(name="chat", path=str(write_rows(tmp_path / "chat.jsonl", rows)))


def steps(stage: PreparedStage, count: int, start: int = 0, **fields: int) -> list[Batch]:
    with BatchLoader(stage, seed=4, global_batch=24, start_sequence=start, **fields) as loader:
        found = [batch for _ in range(count) for batch in loader.next_step()]
        assert loader.position == start + 24 * count
    return found


def same(left: list[Batch], right: list[Batch]) -> bool:
    """Whether the rows, one after the other, are equal in all parts."""
    names = ("tokens", "labels", "positions", "source")
    return all(
        torch.equal(torch.cat([getattr(b, n) for b in left]), torch.cat([getattr(b, n) for b in right])) for n in names
    )


@pytest.mark.parametrize("packing", ["best_fit", "concat"])
def test_one_pass_over_a_source_predicts_every_token_of_its_documents_once(
    text_source: Make, tokenizer: Tokenizer, tmp_path: Path, packing: str
) -> None:
    source = text_source("a")
    config = DataConfig(sources=(source,), packing=packing)  # type: ignore[arg-type]
    stage = prepare_stage(config, tokenizer, 32, tmp_path / "cache", 0)
    expected: Counter[tuple[int, int]] = Counter()
    for document in read_documents(source, part="train"):
        ids = tokenizer.document(tokenizer.encode(document.text))
        expected.update(zip(ids[:-1], ids[1:], strict=True))
    loader = BatchLoader(stage, seed=0, global_batch=stage.sources[0].index.rows)
    (batch,) = loader.build_step(0)
    counted = batch.labels != IGNORE
    found = Counter(zip(batch.tokens[counted].tolist(), batch.labels[counted].tolist(), strict=True))
    assert found == expected and batch.supervised_tokens == expected.total()


def test_positions_restart_with_every_document_and_labels_are_the_next_tokens(stage: PreparedStage) -> None:
    (batch,) = steps(stage, 1)
    starts = batch.positions == 0
    inside = ~starts
    assert (batch.positions[inside] == torch.roll(batch.positions, 1, 1)[inside] + 1).all()
    follows = inside[:, 1:] & (batch.labels[:, :-1] != IGNORE)
    assert torch.equal(batch.tokens[:, 1:][follows], batch.labels[:, :-1][follows])
    padding = batch.labels == IGNORE
    assert (batch.tokens[padding] == stage.pad_id).all() and (batch.positions[padding] == 0).all()
    assert all(t.dtype == torch.int64 for t in (batch.tokens, batch.labels, batch.positions, batch.source))


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_the_global_order_does_not_depend_on_the_number_of_workers(stage: PreparedStage, world: int) -> None:
    alone = steps(stage, 3)
    parts = [steps(stage, 3, rank=rank, world=world, micro_batch=2) for rank in range(world)]
    each = len(parts[0]) // 3
    merged = [batch for step in range(3) for part in parts for batch in part[step * each : (step + 1) * each]]
    assert same(alone, merged)


def test_stopping_twice_anywhere_and_going_on_with_other_workers_gives_the_same_batches(stage: PreparedStage) -> None:
    whole = steps(stage, 30)  # several passes over both sources
    first, second = np.sort(np.random.default_rng(0).choice(np.arange(1, 29), 2, replace=False)).tolist()
    parts = steps(stage, first) + steps(stage, second - first, start=24 * first)
    parts += steps(stage, 30 - second, start=24 * second)
    assert same(whole, parts)


def test_the_order_changes_with_the_seed_and_with_every_pass(
    text_source: Make, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    stage = prepare_stage(DataConfig(sources=(text_source("a"),)), tokenizer, 32, tmp_path / "cache", 0)
    rows = stage.sources[0].index.rows
    zero, again, one = (BatchLoader(stage, seed=seed, global_batch=rows) for seed in (0, 0, 1))
    first = zero.build_step(0)
    assert same(first, again.build_step(0))
    assert not same(first, one.build_step(0)) and not same(first, zero.build_step(rows))


def test_chat_batches_supervise_exactly_what_the_renderer_does(tokenizer: Tokenizer, tmp_path: Path) -> None:
    from data_pipeline.chat import render_batch

    source = chat_source(tmp_path)
    stage = prepare_stage(DataConfig(sources=(source,), kind="chat"), tokenizer, 64, tmp_path / "cache", 0)
    documents = list(read_documents(source, part="train"))
    rendered = render_batch(tokenizer, [d.messages or [] for d in documents])
    expected = Counter(token for ids, mask in rendered for token, learn in zip(ids, mask, strict=True) if learn)
    meta, index = stage.sources[0].shard.meta, stage.sources[0].index
    assert meta.dropped == sum(not any(mask) for _, mask in rendered) > 0 and index.dropped == 0
    (batch,) = BatchLoader(stage, seed=0, global_batch=index.rows).build_step(0)
    assert Counter(batch.labels[batch.labels != IGNORE].tolist()) == expected
    starts = (batch.positions == 0) & (batch.tokens != stage.pad_id)
    assert set(batch.tokens[starts].tolist()) == {tokenizer.bos_id}, "no row starts in the middle of a conversation"
    with pytest.raises(DataError, match="no `messages`"):
        text = write_rows(tmp_path / "t.jsonl", [{"text": "x"}] * 3)
        bad = DataConfig(sources=(SourceConfig(name="t", path=str(text)),), kind="chat")
        prepare_stage(bad, tokenizer, 64, tmp_path / "cache", 0)


def test_preparing_again_reuses_the_files_wherever_the_source_lies(
    data: DataConfig, stage: PreparedStage, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    from dataclasses import replace

    shards = tmp_path / "cache" / "shards"
    before = {file: file.stat().st_mtime_ns for file in shards.rglob("*.bin")}
    moved = tmp_path / "moved.jsonl"
    shutil.copy(data.sources[0].path, moved)
    elsewhere = replace(data, sources=(replace(data.sources[0], path=str(moved)), data.sources[1]))
    again = prepare_stage(elsewhere, tokenizer, 32, tmp_path / "cache", 0)
    assert again.fingerprint == stage.fingerprint
    assert {file: file.stat().st_mtime_ns for file in shards.rglob("*.bin")} == before
    moved.write_bytes(moved.read_bytes() + b'{"text": "one more"}\n')
    assert prepare_stage(elsewhere, tokenizer, 32, tmp_path / "cache", 0).fingerprint != stage.fingerprint
    for changed in (replace(data, packing="concat"), replace(data, sources=data.sources[::-1])):
        assert prepare_stage(changed, tokenizer, 32, tmp_path / "cache", 0).fingerprint != stage.fingerprint


def test_processes_that_prepare_at_once_agree_and_leave_one_copy(data: DataConfig, tmp_path: Path) -> None:
    code = (
        "import sys; from data_pipeline.config import *; from data_pipeline.prepare import *\n"
        "d = DataConfig(sources=(SourceConfig(name='a', path=sys.argv[1]),))\n"
        "t = ensure_tokenizer(TokenizerConfig(vocab_size=300), d, sys.argv[2], 0)\n"
        "print(prepare_stage(d, t, 32, sys.argv[2], 0).fingerprint)"
    )
    command = [sys.executable, "-c", code, data.sources[0].path, str(tmp_path / "cache")]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    answers = {process.communicate(timeout=60)[0].strip() for process in running}
    assert len(answers) == 1 and len(answers.pop()) == 64
    made = [path for path in (tmp_path / "cache" / "shards").iterdir() if path.is_dir()]
    assert len(made) == 1 and not [path for path in made if path.name.startswith(".")]


@pytest.mark.parametrize("name", ["tokens.bin", "documents.idx", "meta.json"])
@pytest.mark.parametrize("damage", ["truncate", "flip", "empty", "remove"])
def test_a_damaged_shard_is_named_and_never_loaded(
    data: DataConfig, stage: PreparedStage, tokenizer: Tokenizer, tmp_path: Path, name: str, damage: str
) -> None:
    file = stage.sources[0].shard.path / name
    content = file.read_bytes()
    broken = {"truncate": content[:-3], "flip": b"\xfe" + content[1:], "empty": b"", "remove": b""}[damage]
    file.unlink()
    if damage != "remove":
        file.write_bytes(broken)
    with pytest.raises(DataError, match=name):
        prepare_stage(data, tokenizer, 32, tmp_path / "cache", 0)


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty"])
def test_a_damaged_packing_is_named_and_never_loaded(
    data: DataConfig, stage: PreparedStage, tokenizer: Tokenizer, tmp_path: Path, damage: str
) -> None:
    file = max((tmp_path / "cache" / "packs").glob("*.npz"))
    content = file.read_bytes()
    middle = len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :]
    file.write_bytes({"truncate": content[:-30], "flip": flipped, "empty": b""}[damage])
    with pytest.raises(DataError, match="delete it"):
        prepare_stage(data, tokenizer, 32, tmp_path / "cache", 0)


@pytest.mark.parametrize(("vocabulary", "dtype"), [(65_536, "uint16"), (65_537, "uint32")])
def test_ids_are_stored_in_the_smallest_type_that_holds_them(tmp_path: Path, vocabulary: int, dtype: str) -> None:
    from data_pipeline.shards import ShardCounts

    ids = np.array([0, vocabulary - 1, 5])
    write_shard(tmp_path / "s", [(ids, np.array([3]), None)], source="s", tokenizer="t", vocab_size=vocabulary,
                counts=ShardCounts())  # fmt: skip
    shard = open_shard(tmp_path / "s")
    assert shard.tokens.tolist() == ids.tolist() and shard.tokens.dtype == dtype


def test_a_shard_that_fails_halfway_leaves_nothing(tmp_path: Path) -> None:
    from data_pipeline.shards import ShardCounts

    def groups() -> Iterator[tuple[np.ndarray, np.ndarray, None]]:
        yield np.arange(4), np.array([4]), None
        raise DataError("the source broke")

    with pytest.raises(DataError, match="broke"):
        write_shard(tmp_path / "s", groups(), source="s", tokenizer="t", vocab_size=9, counts=ShardCounts())
    assert list(tmp_path.iterdir()) == []


def test_the_plan_counts_what_will_be_read_and_refuses_too_many_passes(stage: PreparedStage) -> None:
    rows = stage.plan(10, 24)
    assert [row.sequences for row in rows] == stage.mixture(0).counts(240).tolist()
    assert sum(row.share for row in rows) == 1.0
    assert abs(rows[0].share - 0.75) < 0.02
    with pytest.raises(DataError, match="max_passes=50"):
        stage.plan(100_000, 24)


def test_a_batch_that_the_workers_cannot_share_is_refused(stage: PreparedStage) -> None:
    with pytest.raises(DataError, match="global_batch=24 over 5 workers"):
        BatchLoader(stage, seed=0, global_batch=24, rank=0, world=5)


def test_a_failure_in_the_thread_reaches_the_caller(stage: PreparedStage, monkeypatch: pytest.MonkeyPatch) -> None:
    loader = BatchLoader(stage, seed=0, global_batch=24)
    monkeypatch.setattr(loader, "build_step", lambda start: (_ for _ in ()).throw(OSError("disk gone")))
    with pytest.raises(OSError, match="disk gone"):
        loader.next_step()


def test_the_tokenizer_is_trained_once_and_only_on_training_text(data: DataConfig, tmp_path: Path) -> None:
    config = TokenizerConfig(vocab_size=300, train_bytes=2000)
    first = ensure_tokenizer(config, data, tmp_path / "cache", 0)
    (file,) = (tmp_path / "cache" / "tokenizers").glob("*.json")
    stamp = file.stat().st_mtime_ns
    second = ensure_tokenizer(config, data, tmp_path / "cache", 0)
    assert first.fingerprint == second.fingerprint and file.stat().st_mtime_ns == stamp
    assert ensure_tokenizer(TokenizerConfig(path=str(file)), data, tmp_path, 0).fingerprint == first.fingerprint
    with pytest.raises(DataError, match="no such file"):
        ensure_tokenizer(TokenizerConfig(path=str(tmp_path / "none")), data, tmp_path, 0)
