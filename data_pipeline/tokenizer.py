"""Byte-level BPE: trained here, or loaded from any `tokenizer.json`.

The new tokenizer carries the special tokens and the splitting rule of Llama 3 (the family that MobileLLM-R1 and -Pro
use), so that its files are understood by other runtimes without a rule of our own.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import tokenizers

from data_pipeline.errors import DataError

BOS, EOS, EOT, PAD = "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|pad|>"
START_HEADER, END_HEADER = "<|start_header_id|>", "<|end_header_id|>"
SPECIAL_TOKENS = (BOS, EOS, EOT, START_HEADER, END_HEADER, PAD)

# Llama 3's splitting rule, as in its published tokenizer.json.
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Names under which published tokenizers keep these tokens, most specific first.
_NAMES = {
    "bos": (BOS, "<s>", "<bos>", "<|startoftext|>", "<|begin▁of▁sentence|>", "[BOS]"),
    "eos": (EOS, "</s>", "<|endoftext|>", "<eos>", "<|end▁of▁sentence|>", "[EOS]", "<|im_end|>"),
    "eot": (EOT, "<|im_end|>", "<end_of_turn>", "<|eot|>", "<|end|>"),
    "pad": (PAD, "<|finetune_right_pad_id|>", "<|padding|>", "<pad>", "[PAD]"),
}


class Tokenizer:
    """Text to ids and back. Special tokens are ids that only the caller adds: text that spells one stays text."""

    def __init__(self, backend: tokenizers.Tokenizer, declared: dict[str, str] | None = None) -> None:
        """`declared` maps "bos", "eos", "eot", "pad" to a token's text, used where no common name is found."""
        backend.no_truncation()
        backend.no_padding()
        self._json = backend.to_str()
        self._backend = backend
        # Without this a document that contains the text "<|eot_id|>" could end a turn.
        backend.encode_special_tokens = True
        declared = declared or {}
        ids = {role: self._find(names, declared.get(role)) for role, names in _NAMES.items()}
        self.bos_id: int | None = ids["bos"]
        self.eos_id: int | None = ids["eos"]
        self.eot_id: int | None = ids["eot"]
        fallback = self.eos_id if self.eos_id is not None else 0
        # Padding never carries a loss, so any id in the vocabulary serves where there is no token for it.
        self.pad_id: int = ids["pad"] if ids["pad"] is not None else fallback
        # One more than the largest id, so that every id fits an embedding of this size.
        self.vocab_size: int = max(backend.get_vocab().values()) + 1
        self.fingerprint: str = hashlib.sha256(self._json.encode()).hexdigest()

    def _find(self, names: Sequence[str], declared: str | None) -> int | None:
        for name in (*names, declared):
            found = self.token_id(name) if name else None
            if found is not None:
                return found
        return None

    @classmethod
    def from_file(cls, path: str | Path) -> Tokenizer:
        """Load a `tokenizer.json`, or a folder that holds one (its `tokenizer_config.json` is consulted for names)."""
        file = Path(os.path.expandvars(str(path))).expanduser()
        if file.is_dir():
            file = file / "tokenizer.json"
        if not file.is_file():
            raise DataError(f"tokenizer {file}: no such file; give a tokenizer.json or a folder that holds one")
        try:
            backend = tokenizers.Tokenizer.from_str(file.read_text("utf-8"))
        except Exception as error:  # the library raises bare Exception for every malformed file
            raise DataError(f"tokenizer {file}: not a readable tokenizer.json ({error}); replace the file") from error
        return cls(backend, _declared_tokens(file.with_name("tokenizer_config.json")))

    @classmethod
    def from_json(cls, text: str) -> Tokenizer:
        """The tokenizer that `to_json` wrote (a checkpoint carries it as a document)."""
        try:
            return cls(tokenizers.Tokenizer.from_str(text))
        except Exception as error:  # as in from_file
            raise DataError(f"tokenizer: not a readable tokenizer.json ({error}); replace the checkpoint") from error

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """Train a byte-level BPE of exactly `vocab_size` tokens; reserved ones fill up where the text is too short."""
        least = 256 + len(SPECIAL_TOKENS)
        if vocab_size < least:
            raise DataError(f"vocab_size={vocab_size}: a byte-level vocabulary needs at least {least} tokens; raise it")
        from tokenizers import Regex, decoders, models, pre_tokenizers, processors, trainers

        backend = tokenizers.Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ])
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(SPECIAL_TOKENS),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        backend.train_from_iterator(texts, trainer)
        missing = vocab_size - backend.get_vocab_size()
        backend.add_special_tokens([f"<|reserved_{i}|>" for i in range(missing)])
        backend.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", pair=f"{BOS} $A {BOS}:1 $B:1", special_tokens=[(BOS, backend.token_to_id(BOS))]
        )
        return cls(backend)

    def token_id(self, token: str) -> int | None:
        """The id of a token by its text, None where the vocabulary has none."""
        return self._backend.token_to_id(token)

    def encode(self, text: str) -> list[int]:
        """Ids of the text alone: no BOS, no EOS."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """As `encode`, over many texts at once and on all cores."""
        return [item.ids for item in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of the ids; special tokens are left out unless asked for."""
        return self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def document(self, ids: list[int]) -> list[int]:
        """[bos] ids [eos], with the ends that this tokenizer has."""
        head = [] if self.bos_id is None else [self.bos_id]
        tail = [] if self.eos_id is None else [self.eos_id]
        return head + ids + tail

    def to_json(self) -> str:
        """The content of `tokenizer.json`."""
        return self._json

    def save(self, path: str | Path) -> None:
        """Write `tokenizer.json` (to `path` itself, or into it when it is a folder), whole or not at all."""
        file = Path(path)
        if file.is_dir():
            file = file / "tokenizer.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_name(f".{file.name}.{os.getpid()}")
        temporary.write_text(self._json, "utf-8")
        os.replace(temporary, file)


def _declared_tokens(file: Path) -> dict[str, str]:
    """Special tokens that a Hugging Face `tokenizer_config.json` names; empty when there is none."""
    if not file.is_file():
        return {}
    try:
        config = json.loads(file.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}: not JSON ({error}); replace the file or remove it") from error
    found: dict[str, str] = {}
    for role in ("bos", "eos", "pad"):
        token = config.get(f"{role}_token")
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            found[role] = token
    return found
