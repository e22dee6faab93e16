"""Accuracy of a causal language model on labelled rows: exact match and choice accuracy."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from loragen.core.data.dataset import Row, allowed_answers, closed_answers
from loragen.core.data.tokenize import Example, answer_ids, pad_id, prompt_ids
from loragen.core.lora.packing import answer_losses, collate


@dataclass(frozen=True)
class Scores:
    """The scores of a model on labelled rows. Accuracies are shares from 0 to 1."""

    rows: int
    exact_match: float
    """Share of rows whose greedy answer equals the response, both stripped."""
    choice_accuracy: float | None
    """Share of rows whose response is the most likely of its choices; None without choices."""
    format_validity: float | None
    """Share of answers that are allowed, right or not; None if every text is allowed."""
    choices: int | None
    """The size of the closed answer set; None if there is none."""
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def evaluate_model(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    batch_size: int = 32,
    choices: bool = True,
    closed: list[str] | None = None,
) -> Scores:
    """Scores a causal language model, with or without an adapter, on labelled rows.

    `closed` is `Dataset.closed_answers` of the whole dataset, if `rows` are only some of its
    rows; by default it is derived from `rows`. `choices=False` leaves out the choice accuracy,
    which costs a forward pass per choice.
    """
    started = time.perf_counter()
    answers = [text.strip() for text in generate(model, tokenizer, rows, batch_size)]
    hits = [given == row.response.strip() for given, row in zip(answers, rows, strict=True)]
    closed = closed or closed_answers(rows)
    accuracy = choice_accuracy(model, tokenizer, rows, closed, batch_size) if choices else None
    return Scores(
        rows=len(rows),
        exact_match=sum(hits) / len(rows),
        choice_accuracy=accuracy,
        format_validity=format_validity(answers, rows, closed),
        choices=len(closed) if closed else None,
        seconds=round(time.perf_counter() - started, 3),
    )


@torch.inference_mode()
def generate(model: Any, tokenizer: Any, rows: Sequence[Row], batch_size: int) -> list[str]:
    """Returns the greedy answers, each at most as long as the longest response."""
    max_new_tokens = max(len(answer_ids(tokenizer, row.response)) for row in rows)
    padding = pad_id(tokenizer)
    prompts = [prompt_ids(tokenizer, row.prompt, row.system, row.history) for row in rows]
    order = sorted(range(len(rows)), key=lambda row: len(prompts[row]))  # needs little padding
    texts = [""] * len(rows)
    for first in range(0, len(rows), batch_size):
        batch = order[first : first + batch_size]
        length = max(len(prompts[row]) for row in batch)
        ids = torch.full((len(batch), length), padding)  # padded on the left
        attention = torch.zeros_like(ids)
        for index, row in enumerate(batch):
            ids[index, length - len(prompts[row]) :] = torch.tensor(prompts[row])
            attention[index, length - len(prompts[row]) :] = 1
        generated = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=attention.to(model.device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=padding,
            eos_token_id=tokenizer.eos_token_id,
        )
        answers = tokenizer.batch_decode(generated[:, length:], skip_special_tokens=True)
        for row, answer in zip(batch, answers, strict=True):
            texts[row] = answer
    return texts


def format_validity(
    answers: Sequence[str], rows: Sequence[Row], closed: list[str] | None
) -> float | None:
    """Returns the share of `answers` that are one of their row's choices, or of the closed set,
    apart from surrounding white space; None if some row has neither."""
    allowed = allowed_answers(rows, closed)
    if allowed is None:
        return None
    valid = [
        given.strip() in {one.strip() for one in known}
        for given, known in zip(answers, allowed, strict=True)
    ]
    return sum(valid) / len(rows)


def choice_accuracy(
    model: Any, tokenizer: Any, rows: Sequence[Row], closed: list[str] | None, batch_size: int = 32
) -> float | None:
    """Returns the share of rows whose response has the highest log-likelihood of its choices: the
    row's own, else the closed set. None if some row has neither."""
    options = allowed_answers(rows, closed)
    if options is None:
        return None
    examples, owners = [], []
    for index, (row, candidates) in enumerate(zip(rows, options, strict=True)):
        prompt = prompt_ids(tokenizer, row.prompt, row.system, row.history)
        for candidate in candidates:
            answer = answer_ids(tokenizer, candidate)
            examples.append(Example([*prompt, *answer], len(answer)))
            owners.append((index, candidate))
    scores = log_likelihoods(model, examples, pad_id(tokenizer), batch_size)
    best: dict[int, tuple[float, str]] = {}
    for (index, candidate), score in zip(owners, scores.tolist(), strict=True):
        best[index] = max(best.get(index, (float("-inf"), "")), (score, candidate))
    return sum(best[i][1] == row.response for i, row in enumerate(rows)) / len(rows)


@torch.inference_mode()
def log_likelihoods(
    model: Any, examples: Sequence[Example], padding: int, batch_size: int
) -> Tensor:
    """Returns the log-likelihood (nats) of each example's answer, given its prompt,
    ``[examples]``."""
    sums = []
    for first in range(0, len(examples), batch_size):
        several = examples[first : first + batch_size]
        batch = collate(several, padding).to(model.device)
        lengths = torch.tensor([item.num_label_tokens for item in several])
        owner = torch.repeat_interleave(torch.arange(len(several)), lengths)  # (answers,)
        losses = answer_losses(model, batch).float().cpu()
        sums.append(-torch.zeros(len(several)).index_add_(0, owner, losses))
    return torch.cat(sums)
