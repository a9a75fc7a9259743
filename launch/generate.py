"""Continue a prompt, streamed to standard output.

M is a run directory, a checkpoint, a Hugging Face folder or a packed file.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the root in place of launch/, whose names would hide others

from launch.cli import Parser, run  # noqa: E402
from launch.models import add_runtime_options, load_generator  # noqa: E402
from launch.overrides import is_unicode  # noqa: E402
from stages.errors import InputError  # noqa: E402


def main() -> None:
    parser = Parser(__doc__, recipe=False)
    parser.add_argument("--model", metavar="M", type=Path, required=True)
    parser.add_argument("--prompt", metavar="TEXT", required=True)
    parser.add_argument("--chat", action="store_true", help="ask the prompt as a user; the assistant answers")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    add_runtime_options(parser)
    options, _ = parser.parse()
    _check(options)
    from data_pipeline.chat import render_prompt

    loaded, generate = load_generator(options.model, options)
    tokenizer = loaded.tokenizer
    if options.chat:
        ids = render_prompt(tokenizer, [{"role": "user", "content": options.prompt}])
    else:
        ids = [*([] if tokenizer.bos_id is None else [tokenizer.bos_id]), *tokenizer.encode(options.prompt)]
    stop = [token for token in (tokenizer.eos_id, tokenizer.eot_id) if token is not None]
    tokens = generate(ids, options.max_new_tokens, temperature=options.temperature, top_p=options.top_p, seed=options.seed,
                      stop_ids=stop)
    produced: list[int] = []
    shown = ""
    for token in tokens:
        produced.append(token)
        text = tokenizer.decode(produced)
        if not text.endswith("\ufffd"):  # a character may still lack bytes
            sys.stdout.write(text[len(shown):])
            sys.stdout.flush()
            shown = text
    sys.stdout.write(tokenizer.decode(produced)[len(shown):] + "\n")


def _check(options: argparse.Namespace) -> None:
    for name, least, most in (("max_new_tokens", 1, 2**20), ("temperature", 0, 1_000_000), ("seed", 0, 2**63 - 1)):
        value = getattr(options, name)
        if not least <= value <= most:  # a nan is not in between either
            raise InputError(f"--{name.replace('_', '-')} {value}; expected {least} to {most}")
    if not 0 < options.top_p <= 1:
        raise InputError(f"--top-p {options.top_p}; expected more than 0 and at most 1")
    if not is_unicode(options.prompt):
        raise InputError(f"--prompt {options.prompt!r} is not UTF-8; expected text in UTF-8")


if __name__ == "__main__":
    run(main)
