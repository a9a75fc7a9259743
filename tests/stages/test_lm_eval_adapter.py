"""lm_eval on our models: the same items give our own numbers."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.tasks import ChoiceItem, read_choice_items
from data_pipeline.tokenizer import Tokenizer
from modeling.config import ModelConfig
from modeling.decoder import Decoder
from modeling.generate import generate
from modeling.init import init_weights
from stages.evaluate import multiple_choice, perplexity
from stages.loading import LoadedModel
from stages.scoring import decoder_nll

lm_eval = pytest.importorskip("lm_eval", reason="the extra lm-eval is not installed")
pytest.importorskip("datasets", reason="lm_eval reads its data with the extra hub")

WORDS = "the cat sat on a mat and dog ran over dike quick brown fox jumps lazy".split()


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    tokenizer = Tokenizer.train([" ".join(WORDS)] * 30, 320)
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=1, ffn_size=48,
        head_dim=16, init_std=0.3, max_positions=64,
    )  # fmt: skip
    model = Decoder(config).eval()
    init_weights(model, 0)
    return LoadedModel(
        token_nll=decoder_nll(model), tokenizer=tokenizer, context=64, model=model, kind="checkpoint", path=Path("."),
        lineage=None, quant=None,
    )  # fmt: skip


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    yield


def run(loaded: LoadedModel, file: Path, **task: Any) -> dict[str, float]:
    from lm_eval.tasks import TaskManager

    from stages.lm_eval_adapter import PocketforgeLM

    config = {
        "task": "local", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(file)}},
        "test_split": "test", **task,
    }  # fmt: skip
    found = lm_eval.simple_evaluate(
        model=PocketforgeLM(loaded), tasks=[config], bootstrap_iters=0, log_samples=False, verbosity="ERROR",
        task_manager=TaskManager(include_defaults=False),
    )  # fmt: skip
    return found["results"]["local"]


def test_lm_eval_gives_our_acc_and_acc_norm_on_the_same_items(loaded: LoadedModel, tmp_path: Path) -> None:
    rng = random.Random(0)

    def draw(low: int, high: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(low, high)))

    rows = [
        {"id": str(n), "context": "", "question": draw(2, 60 if n % 5 == 0 else 8), "answer_index": rng.randrange(4),
         "choices": [draw(1, 6) for _ in range(4)]}
        for n in range(40)
    ]  # fmt: skip
    file = tmp_path / "items.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    theirs = run(
        loaded, file, output_type="multiple_choice", doc_to_text="Question: {{question}}\nAnswer:",
        doc_to_choice="choices", doc_to_target="answer_index",
        metric_list=[{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")],
    )  # fmt: skip
    items: list[ChoiceItem] = read_choice_items(file)
    ours = multiple_choice(loaded, items)
    assert ours["acc"] != ours["acc_norm"]
    assert theirs["acc,none"] == pytest.approx(ours["acc"])
    assert theirs["acc_norm,none"] == pytest.approx(ours["acc_norm"])


def test_lm_eval_gives_our_perplexity_on_the_same_documents(loaded: LoadedModel, tmp_path: Path) -> None:
    rng = random.Random(1)
    texts = [" ".join(rng.choices(WORDS, k=length)) for length in (5, 30, 200)]
    file = tmp_path / "texts.jsonl"
    file.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    metrics = ("word_perplexity", "bits_per_byte")
    theirs = run(loaded, file, output_type="loglikelihood_rolling", doc_to_text="", doc_to_target="{{text}}",
                 metric_list=[{"metric": name} for name in metrics])  # fmt: skip
    ours = perplexity(loaded, texts)
    for metric in metrics:
        assert theirs[f"{metric},none"] == pytest.approx(ours[metric], rel=1e-5)


def test_a_continuation_is_greedy_exactly_when_the_model_would_write_it(loaded: LoadedModel) -> None:
    from lm_eval.api.instance import Instance

    from stages.lm_eval_adapter import PocketforgeLM

    lm, tokenizer = PocketforgeLM(loaded), loaded.tokenizer
    prompt = tokenizer.encode("the cat")
    assert tokenizer.bos_id is not None
    written = list(generate(loaded.model, [tokenizer.bos_id, *prompt], 4))
    other = [written[0], (written[1] + 1) % tokenizer.vocab_size]
    requests = [(("", ""), prompt, ids) for ids in (written, other)]
    assert [greedy for _, greedy in lm._loglikelihood_tokens(requests)] == [True, False]
    (likelihood, _), = lm.loglikelihood([Instance("loglikelihood", {}, ("", "the cat"), 0)])
    assert likelihood == pytest.approx(lm.loglikelihood_rolling([Instance("r", {}, ("the cat",), 0)])[0], rel=1e-5)


def test_generation_stops_at_a_text_and_at_the_number_of_tokens(loaded: LoadedModel) -> None:
    from lm_eval.api.instance import Instance

    from stages.lm_eval_adapter import PocketforgeLM

    lm = PocketforgeLM(loaded)

    def answer(**options: Any) -> str:
        return lm.generate_until([Instance("generate_until", {}, ("the cat sat " * 40, options), 0)])[0]

    whole = answer(until=[], max_gen_toks=12)
    assert whole
    assert len(answer(until=[], max_gen_toks=3)) < len(whole)
    stop = whole[len(whole) // 2 :][:2]
    assert answer(until=[stop], max_gen_toks=12) == whole.split(stop)[0]
