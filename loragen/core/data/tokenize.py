"""Rows -> token ids with a loss mask, through the tokenizer's chat template where it has one."""

from typing import Any, NamedTuple

from loragen.core.data.rows import Row
from loragen.core.errors import DataError


class Example(NamedTuple):
    """One row in tokens: `ids` ends with the answer and the end token, `answer` of them."""

    ids: list[int]
    answer: int


def prompt_ids(tokenizer: Any, prompt: str, system: str | None = None) -> list[int]:
    """The tokens after which the answer begins."""
    if tokenizer.chat_template:
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": prompt})
        encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True)
        return list(encoded["input_ids"] if hasattr(encoded, "keys") else encoded)
    text = f"{system}\n{prompt}\n" if system else f"{prompt}\n"
    return list(tokenizer(text)["input_ids"])


def answer_ids(tokenizer: Any, response: str) -> list[int]:
    """The answer's tokens and the end token, which is learned too: it says when to stop."""
    ids = list(tokenizer(response, add_special_tokens=False)["input_ids"])
    return [*ids, tokenizer.eos_token_id]


def example(tokenizer: Any, row: Row, max_length: int) -> Example:
    """A row that is too long loses the start of its prompt, never any of its answer.

    Raises DataError where the answer alone does not fit.
    """
    prompt = prompt_ids(tokenizer, row.prompt, row.system)
    answer = answer_ids(tokenizer, row.response)
    room = max_length - len(answer)
    if room < 1:
        raise DataError(
            f"line {row.line}: the answer has {len(answer)} tokens, data.max_length is {max_length}"
        )
    return Example([*prompt[-room:], *answer], len(answer))


def pad_id(tokenizer: Any) -> int:
    """The padding id; the end token's where the tokenizer has none (padding is masked anyway)."""
    return int(tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id)
