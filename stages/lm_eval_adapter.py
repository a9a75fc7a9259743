"""EleutherAI's lm_eval on any model that `stages.loading` loads. Needs the extra lm-eval; nothing else imports this.

    python -m stages.lm_eval_adapter --model pocketforge --model_args path=runs/quickstart --tasks arc_easy

Prompts, tasks and metrics are lm_eval's; tokens are scored by `stages.scoring`, after BOS, as our own evaluation does.
Chat templates are not offered: lm_eval passes them as text, and our tokenizer never reads control tokens from text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text

from modeling.generate import generate
from stages.evaluate import pair_rows, prefix_ids, text_rows
from stages.loading import LoadedModel, load_model
from stages.scoring import decoder_nll_and_misses, score_rows


@register_model("pocketforge")
class PocketforgeLM(TemplateLM):
    """`model` is a LoadedModel; from the command line, `path` names what `load_model` takes."""

    def __init__(
        self, model: LoadedModel | None = None, *, path: str = "", device: str | None = "cpu", max_gen_toks: int = 256,
        max_tokens: int = 4096, batch_size: int | str | None = None, max_batch_size: int | None = None,
    ) -> None:  # fmt: skip
        """`max_tokens` is the size of a forward pass; lm_eval's own batch sizes are accepted and not used."""
        super().__init__()
        self.loaded = load_model(path, device or "cpu") if model is None else model
        self.max_gen_toks = int(max_gen_toks)
        self.max_tokens = int(max_tokens)

    @property
    def eot_token_id(self) -> int:
        return self.prefix_token_id if self.loaded.tokenizer.eos_id is None else self.loaded.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        return (prefix_ids(self.loaded.tokenizer) or [self.loaded.tokenizer.pad_id])[0]

    @property
    def max_length(self) -> int:
        return self.loaded.context

    @property
    def tokenizer_name(self) -> str:
        return self.loaded.tokenizer.fingerprint

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        return self.loaded.tokenizer.encode(string)

    def tok_decode(self, tokens: Sequence[int], skip_special_tokens: bool = True) -> str:
        return self.loaded.tokenizer.decode(tokens, skip_special_tokens)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """(log-likelihood, whether each token is the likeliest) of every continuation."""
        rows, owners = [], []
        for index, (_, context, continuation) in enumerate(requests):
            # lm_eval puts the prefix before a continuation that has no context; `pair_rows` does so for all.
            context = context[1:] if context[:1] == prefix_ids(self.loaded.tokenizer) else context
            mine = pair_rows(self.loaded, context, continuation)
            rows += mine
            owners += [index] * len(mine)
        scores = score_rows(decoder_nll_and_misses(self.loaded.model), rows, max_tokens=self.max_tokens).tolist()
        nll, misses = [0.0] * len(requests), [0.0] * len(requests)
        for owner, (value, missed) in zip(owners, scores, strict=True):
            nll[owner] += value
            misses[owner] += missed
        answers = [(-value, missed == 0) for value, missed in zip(nll, misses, strict=True)]
        for (texts, _, _), answer in zip(requests, answers, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in the windows of our own perplexity."""
        totals = []
        for (text,) in (request.args for request in requests):
            totals.append(-float(self.loaded.score(text_rows(self.loaded, self.tok_encode(text))).sum()))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), totals[-1])
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continuations up to a stop text, the end of the text, or the number of tokens asked for."""
        texts = []
        for context, options in (request.args for request in requests):
            texts.append(self._continue(context, options))
            self.cache_hook.add_partial("generate_until", (context, options), texts[-1])
        return texts

    def _continue(self, context: str, options: dict[str, Any]) -> str:
        wanted = normalize_gen_kwargs(options, self.max_gen_toks)
        stops = handle_stop_sequences(wanted.get("until"), eos=None)
        # At least half of the model's context stays for what is given, whose beginning gives way.
        new_tokens = min(wanted["max_gen_toks"], max(self.max_length // 2, 1))
        prefix = prefix_ids(self.loaded.tokenizer)
        room = self.max_length - new_tokens - len(prefix)
        prompt = prefix + (self.tok_encode(context)[-room:] if room > 0 else [])
        ends = {i for i in (self.loaded.tokenizer.eos_id, self.loaded.tokenizer.eot_id) if i is not None}
        produced: list[int] = []
        text = ""
        tokens = generate(
            self.loaded.model, prompt or [self.eot_token_id], new_tokens, temperature=wanted.get("temperature", 0.0),
            top_p=wanted.get("top_p", 1.0), stop_ids=ends,
        )  # fmt: skip
        for token in tokens:
            produced.append(token)
            text = self.tok_decode(produced)
            if any(stop and stop in text for stop in stops):
                break
        return postprocess_generated_text(text, stops, None)


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
