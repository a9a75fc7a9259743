"""A byte-level BPE `tokenizer.json` as GGUF keys, so that llama.cpp splits text and merges as ours does.

llama.cpp has no splitting rule in the file: it knows rules by name (`tokenizer.ggml.pre`). A name also decides whether a
word that is a token as a whole is taken without merging it: Llama 3's files say so (`llama-bpe`), tokenizers trained
here do not (`dbrx`: the same rule, always merged).
"""

from __future__ import annotations

import json
from typing import Any

from data_pipeline.tokenizer import SPLIT_PATTERN, Tokenizer
from stages.errors import InputError
from stages.export import chat_template

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
"""llama.cpp's token types: text never becomes a CONTROL token, and always a USER_DEFINED one where it spells it."""


def add_tokenizer(writer: Any, tokenizer: Tokenizer | None, vocab_size: int) -> None:
    """Add tokenizer.ggml.* to a `gguf.GGUFWriter`; without a tokenizer the file says that it has none.

    Raises:
        InputError: a tokenizer that llama.cpp would read otherwise than we do.
    """
    if tokenizer is None:
        writer.add_tokenizer_model("none")
        return
    content = json.loads(tokenizer.to_json())
    pre = _pre_name(content)
    texts, types = _tokens(content, vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(texts)
    writer.add_token_types(types)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in content["model"]["merges"]]
    if merges:
        writer.add_token_merges(merges)
    for role in ("bos", "eos", "eot", "pad"):
        if (found := getattr(tokenizer, f"{role}_id")) is not None:
            getattr(writer, f"add_{role}_token_id")(found)
    writer.add_add_bos_token(tokenizer.bos_id is not None)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(False)
    if template := chat_template(tokenizer):
        writer.add_chat_template(template)


def _pre_name(content: dict[str, Any]) -> str:
    model, splitter = content["model"], content.get("pre_tokenizer") or {}
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        raise InputError("the tokenizer is not a byte-level BPE; a GGUF file of ours holds no other")
    if content.get("normalizer"):
        raise InputError("the tokenizer normalises text, which llama.cpp's BPE does not")
    whole_words = bool(model.get("ignore_merges"))
    parts = splitter.get("pretokenizers", [splitter])
    if [part.get("type") for part in parts] == ["Split", "ByteLevel"]:
        split, level = parts
        ours = split.get("pattern") == {"Regex": SPLIT_PATTERN} and split.get("behavior") == "Isolated"
        if ours and not split.get("invert") and not level.get("add_prefix_space") and not level.get("use_regex"):
            return "llama-bpe" if whole_words else "dbrx"
    if [part.get("type") for part in parts] == ["ByteLevel"] and not whole_words:
        if parts[0].get("use_regex", True) and not parts[0].get("add_prefix_space"):
            return "gpt-2"
    raise InputError("the tokenizer's splitting rule has no name in llama.cpp that we know; expected Llama 3's or GPT-2's")


def _tokens(content: dict[str, Any], vocab_size: int) -> tuple[list[str], list[int]]:
    texts = [f"[unused{index}]" for index in range(vocab_size)]
    types = [UNUSED] * vocab_size
    for text, index in content["model"]["vocab"].items():
        texts[index], types[index] = text, NORMAL
    for token in content.get("added_tokens", []):
        if any(token.get(key) for key in ("lstrip", "rstrip", "single_word")):
            raise InputError(f"the token {token['content']!r} takes the spaces around it, which llama.cpp's does not")
        texts[token["id"]] = token["content"]
        types[token["id"]] = CONTROL if token.get("special") else USER_DEFINED
    return texts, types
