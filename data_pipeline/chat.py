"""From messages to ids and a loss mask, without ever parsing a string for control tokens.

A conversation is put together from pieces: control tokens enter as ids, contents are encoded alone. So a message that
spells `<|eot_id|>` cannot end its turn, and what is supervised is known exactly: an assistant's content and its
end-of-turn token, not headers, not tool results, and no message with `"train": false`.

Layouts, by the tokens that the vocabulary has:
    llama3  <bos> <|start_header_id|> role <|end_header_id|> "\\n\\n" content <|eot_id|> ...
    chatml  [bos] <|im_start|> role "\\n" content <|im_end|> "\\n" ...
    plain   [bos] "Role:\\n" content <eos> "\\n\\n" ...      (a vocabulary with an end-of-text token only)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from data_pipeline.errors import DataError
from data_pipeline.tokenizer import END_HEADER, START_HEADER, Tokenizer

Message = dict[str, Any]
ROLES = ("system", "user", "assistant", "tool_call", "tool")
SUPERVISED_ROLES = ("assistant", "tool_call")

LLAMA3_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + ('assistant' if message['role'] == 'tool_call' else message['role'])"
    " + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
"""The `llama3` layout as a Jinja template, for `tokenizer_config.json`; a test holds it equal to `render`."""


@dataclass(frozen=True)
class _Layout:
    start: list[int]
    headers: dict[str, list[int]]
    end: int
    after_end: list[int]
    """Unsupervised ids behind the end of a turn."""


def layout_name(tokenizer: Tokenizer) -> str:
    """`llama3`, `chatml` or `plain`. DataError for a vocabulary without any token that could end a turn."""
    if None not in (tokenizer.token_id(START_HEADER), tokenizer.token_id(END_HEADER), tokenizer.eot_id):
        return "llama3"
    if None not in (tokenizer.token_id("<|im_start|>"), tokenizer.token_id("<|im_end|>")):
        return "chatml"
    if tokenizer.eos_id is not None:
        return "plain"
    raise DataError(
        "tokenizer: no token that ends a turn (<|eot_id|>, <|im_end|>, </s>, <|endoftext|>, ...); chat data needs one, "
        "choose another tokenizer"
    )


def end_of_turn_id(tokenizer: Tokenizer) -> int:
    """The id that ends an assistant's turn: where generation stops."""
    return _layout(tokenizer).end


def _layout(tokenizer: Tokenizer) -> _Layout:
    known = getattr(tokenizer, "_chat_layout", None)
    if known is None:
        known = _build_layout(tokenizer)
        tokenizer._chat_layout = known  # type: ignore[attr-defined]
    return known


def _build_layout(tokenizer: Tokenizer) -> _Layout:
    name = layout_name(tokenizer)
    shown = {role: "assistant" if role == "tool_call" else role for role in ROLES}
    start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]

    def special(token: str) -> list[int]:
        found = tokenizer.token_id(token)
        return [] if found is None else [found]

    if name == "llama3":
        opening, closing = special(START_HEADER), special(END_HEADER) + tokenizer.encode("\n\n")
        headers = {role: opening + tokenizer.encode(text) + closing for role, text in shown.items()}
        return _Layout(start, headers, int(tokenizer.eot_id or 0), [])
    if name == "chatml":
        headers = {role: special("<|im_start|>") + tokenizer.encode(f"{text}\n") for role, text in shown.items()}
        return _Layout(start, headers, special("<|im_end|>")[0], tokenizer.encode("\n"))
    headers = {role: tokenizer.encode(f"{text.capitalize()}:\n") for role, text in shown.items()}
    return _Layout(start, headers, int(tokenizer.eos_id or 0), tokenizer.encode("\n\n"))


def check_messages(messages: Any, where: str = "messages") -> None:
    """Raise DataError unless this is a non-empty list of messages with a known role and a text."""
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{where}: expected a non-empty list of messages, found {type(messages).__name__}")
    for number, message in enumerate(messages):
        role = message.get("role") if isinstance(message, dict) else None
        if role not in ROLES:
            raise DataError(f"{where}: message {number} has role {role!r}; expected one of {', '.join(ROLES)}")
        if not isinstance(message.get("content"), str):
            raise DataError(f"{where}: message {number} has no text under `content`")


def render(tokenizer: Tokenizer, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
    """Ids and loss mask of one conversation, both of the same length; mask[i] says that ids[i] is to be predicted.

    The rendering of the first n messages is a prefix of that of n + 1. DataError where nothing would be supervised.
    """
    ids, mask = render_batch(tokenizer, [messages])[0]
    if not any(mask):
        raise DataError("messages: nothing to learn; expected an assistant message with text that may be trained on")
    return ids, mask


def render_batch(tokenizer: Tokenizer, chats: Sequence[Sequence[Message]]) -> list[tuple[list[int], list[bool]]]:
    """`render` of many conversations with one call of the encoder; a mask may be empty of True."""
    layout = _layout(tokenizer)
    for messages in chats:
        check_messages(list(messages))
    contents = iter(tokenizer.encode_batch([message["content"].strip() for chat in chats for message in chat]))
    rendered = []
    for chat in chats:
        ids = list(layout.start)
        mask = [False] * len(ids)
        for message in chat:
            header, content = layout.headers[message["role"]], next(contents)
            ids += [*header, *content, layout.end, *layout.after_end]
            # An empty turn teaches to say nothing, so its end is not supervised either.
            learn = message["role"] in SUPERVISED_ROLES and message.get("train", True) and bool(content)
            mask += [False] * len(header) + [learn] * (len(content) + 1) + [False] * len(layout.after_end)
        rendered.append((ids, mask))
    return rendered


def render_prompt(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """Ids up to where the assistant's next turn starts."""
    layout = _layout(tokenizer)
    return render_batch(tokenizer, [messages])[0][0] + layout.headers["assistant"]
