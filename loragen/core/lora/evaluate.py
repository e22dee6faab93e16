"""Accuracy and loss of a causal language model on labelled rows.

One forward pass over prompts and responses gives the loss of every response, and the most likely
token at each of its positions. A row whose tokens are all the most likely ones is answered right by
greedy decoding, without decoding. Where the first other token already excludes every answer that
counts, the row is wrong; only the few rows in between are decoded on from there.
"""

import shlex
import time
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loragen.core.adapter import weights_in
from loragen.core.adapter.files import read_config
from loragen.core.base.names import absolute_base, is_gguf, resolve_base
from loragen.core.data.chat import (
    answer_ids,
    check_embeddings,
    end_ids,
    generated_ids,
    generated_text,
    pad_id,
    prompt_ids,
)
from loragen.core.data.dataset import Row, allowed_answers, closed_answers
from loragen.core.data.tokenize import Example
from loragen.core.errors import UsageError
from loragen.core.lora.packing import (
    Cost,
    answer_logits,
    cheapest_packing,
    collate,
    packing_cost,
    token_losses,
)

SLACK = 8
"""The tokens by which a decoded answer may exceed the longest that counts: another tokenisation of
the same text may be longer, and an answer counts only if it ends."""


@dataclass(frozen=True)
class Scores:
    """The scores of a model on labelled rows. Accuracies are shares from 0 to 1."""

    rows: int
    exact_match: float
    """Share of rows whose greedy answer equals the response, or another answer that is right, both
    `normalized`."""
    choice_accuracy: float | None
    """Share of rows of whose choices one that is right is the most likely; None without choices."""
    format_validity: float | None
    """Share of answers that are allowed, right or not; None if every text is allowed."""
    choices: int | None
    """The size of the closed answer set; None if there is none."""
    loss: float
    """Mean cross entropy (nats) of the responses' tokens, end tokens included, each given the true
    tokens before it."""
    seconds: float
    hits: tuple[bool, ...] = ()
    """Whether each row is an exact match."""

    def as_dict(self) -> dict[str, Any]:
        """Returns everything but the single rows."""
        return {one.name: getattr(self, one.name) for one in fields(self) if one.name != "hits"}


def evaluate_model(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    batch_size: int = 32,
    choices: bool = True,
    closed: list[str] | None = None,
    ignore_final_punctuation: bool = False,
) -> Scores:
    """Scores a causal language model, with or without an adapter, on labelled rows.

    `closed` are the `Dataset.closed_answers` of the whole dataset, or an empty list if those are
    free, if `rows` are only some of its rows; by default it is derived from `rows`.
    `choices=False` leaves out the choice accuracy, which costs a forward pass per choice.
    """
    return TestRows(tokenizer, rows, closed, ignore_final_punctuation).score(
        model, batch_size, choices
    )


class TestRows:
    """Labelled rows, tokenised once for all models that are tested on them."""

    __test__ = False  # not a test class of pytest

    def __init__(
        self,
        tokenizer: Any,
        rows: Sequence[Row],
        closed: list[str] | None = None,
        ignore_final_punctuation: bool = False,
    ) -> None:
        """`closed` and `ignore_final_punctuation` are those of `evaluate_model`."""
        self.tokenizer, self.rows = tokenizer, rows
        self.closed = closed_answers(rows) if closed is None else closed or None
        self.allowed = allowed_answers(rows, self.closed)
        self.ignore_final_punctuation = ignore_final_punctuation
        self.cost: Cost | None = None
        """The cost of packed batches, once they are known to be right; None: they are padded."""
        self.prompts = [prompt_ids(tokenizer, row.prompt, row.system, row.history) for row in rows]

    @cached_property
    def examples(self) -> list[Example]:
        """The rows in tokens; nothing is cut."""
        return [self._example(index, row.response) for index, row in enumerate(self.rows)]

    def _example(self, row: int, answer: str) -> Example:
        ids = generated_ids(self.tokenizer, answer)
        check_embeddings(self.tokenizer, [*self.prompts[row], *ids])
        return Example([*self.prompts[row], *ids], len(ids))

    def pack(self, model: Any, batch_size: int) -> None:
        """Packs the rows for all models that are tested on them, if this base can be packed. The
        check takes two batches, which the rows' shared prefix soon saves."""
        self.cost = packing_cost(model, self.examples, pad_id(self.tokenizer), batch_size)

    def normalized(self, text: str) -> str:
        return normalized(text, self.ignore_final_punctuation)

    def wanted(self, response: str) -> str:
        """Returns a response as the answer that a model would give: without special tokens, which
        decoding leaves out."""
        return self.normalized(generated_text(self.tokenizer, response))

    def score(self, model: Any, batch_size: int = 32, choices: bool = True) -> Scores:
        """Scores one model, as `evaluate_model`."""
        started = time.perf_counter()
        padding = pad_id(self.tokenizer)
        losses, predicted = answer_predictions(model, self.examples, padding, batch_size, self.cost)
        answers = self._answers(model, predicted, batch_size)
        hits = tuple(
            given in [self.wanted(one) for one in (row.response, *row.also_right)]
            for given, row in zip(answers, self.rows, strict=True)
        )
        validity = None
        if self.allowed is not None:
            valid = [
                given in [self.wanted(one) for one in known]
                for given, known in zip(answers, self.allowed, strict=True)
            ]
            validity = sum(valid) / len(valid)
        return Scores(
            rows=len(self.rows),
            exact_match=sum(hits) / len(hits),
            choice_accuracy=self._choice_accuracy(model, batch_size) if choices else None,
            format_validity=validity,
            choices=len(self.closed) if self.closed else None,
            loss=round(float(torch.cat(losses).mean()), 6),
            seconds=round(time.perf_counter() - started, 3),
            hits=hits,
        )

    def _answers(
        self, model: Any, predicted: Sequence[list[int]], batch_size: int
    ) -> list[str | None]:
        """Returns the greedy answers, normalised; None where it is none that counts.

        `predicted` are the most likely tokens at the positions of each response.
        """
        ends = set(end_token_ids(model, self.tokenizer))
        answers: list[str | None] = [None] * len(self.rows)
        undecided: list[int] = []
        begun: dict[int, list[int]] = {}
        for index, (example, ids) in enumerate(zip(self.examples, predicted, strict=True)):
            wanted = example.ids[-example.num_label_tokens :]
            differs = next((i for i, one in enumerate(ids) if one != wanted[i]), None)
            if differs is None:
                answers[index] = self.wanted(self.rows[index].response)
            elif ids[differs] in ends:
                answers[index] = self._text(wanted[:differs])
            else:
                begun[index] = [*wanted[:differs], ids[differs]]
                if self._may_count(index, begun[index]):
                    undecided.append(index)
        if undecided:
            longest = max(
                len(answer_ids(self.tokenizer, text))
                for text in {text for index in undecided for text in self._counting(index)}
            )
            sequences = [[*self.prompts[index], *begun[index]] for index in undecided]
            found = greedy(model, self.tokenizer, sequences, longest + SLACK, batch_size)
            for index, (more, ended) in zip(undecided, found, strict=True):
                if ended:
                    answers[index] = self._text([*begun[index], *more])
        return answers

    def _counting(self, index: int) -> list[str]:
        """Returns the answers that count for a row: those that are right, and those allowed."""
        row, allowed = self.rows[index], self.allowed[index] if self.allowed else ()
        return [row.response, *row.also_right, *allowed]

    def _may_count(self, index: int, begun: list[int]) -> bool:
        """Returns whether an answer that begins with these tokens may be one that counts."""
        # The last bytes of a token may be half a character. In NFKD, unlike NFKC, a character does
        # not merge with an accent that follows.
        text = self.tokenizer.decode(begun, skip_special_tokens=True).rstrip("\ufffd")
        start = unicodedata.normalize("NFKD", self.normalized(text))
        return any(
            unicodedata.normalize("NFKD", self.wanted(one)).startswith(start)
            for one in self._counting(index)
        )

    def _text(self, ids: list[int]) -> str:
        return self.normalized(self.tokenizer.decode(ids, skip_special_tokens=True))

    def _choice_accuracy(self, model: Any, batch_size: int) -> float | None:
        """Returns the share of rows where an answer that is right has the highest log-likelihood of
        the choices: the row's own, else the closed set. None if some row has neither."""
        if self.allowed is None:
            return None
        candidates = [(i, text) for i, allowed in enumerate(self.allowed) for text in allowed]
        examples = [self._example(index, text) for index, text in candidates]
        scores = log_likelihoods(model, examples, pad_id(self.tokenizer), batch_size)
        best: dict[int, tuple[float, str]] = {}
        for (index, text), score in zip(candidates, scores.tolist(), strict=True):
            best[index] = max(best.get(index, (float("-inf"), "")), (score, text))
        right = [
            best[index][1] in (row.response, *row.also_right) for index, row in enumerate(self.rows)
        ]
        return sum(right) / len(right)


def normalized(text: str, ignore_final_punctuation: bool = False) -> str:
    """Returns a text as answers are compared: in Unicode's form NFKC, every run of white space as
    one space and none at the ends; on request without punctuation at its end, unless it has nothing
    else. Case counts."""
    text = " ".join(unicodedata.normalize("NFKC", text).split())
    if ignore_final_punctuation:
        kept = text
        while kept and unicodedata.category(kept[-1]).startswith("P"):
            kept = kept[:-1].rstrip()
        text = kept or text
    return text


# ---------------------------------------------------------------------------- forward passes


@torch.inference_mode()
def answer_predictions(
    model: Any,
    examples: Sequence[Example],
    padding: int,
    batch_size: int,
    cost: Cost | None = None,
) -> tuple[list[Tensor], list[list[int]]]:
    """Returns, for each example, the cross entropies (nats) of its label tokens ``[labels]``, and
    the most likely token at each of their positions, given the true tokens before it.

    `cost` is that of the model's packed batches; None: they are padded.
    """
    losses, predicted = [torch.empty(0)] * len(examples), [list[int]()] * len(examples)
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].ids))  # little padding
    for first in range(0, len(order), batch_size):
        indices = order[first : first + batch_size]
        several = [examples[i] for i in indices]
        batch = collate(several, padding, cost).to(model.device)
        if cost:
            indices = [indices[i] for one in cheapest_packing(several, cost)[1] for i in one]
        logits, tokens = answer_logits(model, batch)  # (answers, vocabulary), (answers,)
        lengths = [examples[i].num_label_tokens for i in indices]
        of_rows = torch.split(token_losses(logits, tokens).float().cpu(), lengths)
        most_likely = torch.split(logits.argmax(-1).cpu(), lengths)
        for i, loss, ids in zip(indices, of_rows, most_likely, strict=True):
            losses[i], predicted[i] = loss, ids.tolist()
    return losses, predicted


def log_likelihoods(
    model: Any, examples: Sequence[Example], padding: int, batch_size: int
) -> Tensor:
    """Returns the log-likelihood (nats) of each example's answer, given its prompt,
    ``[examples]``."""
    losses, _ = answer_predictions(model, examples, padding, batch_size)
    return torch.stack([-one.sum() for one in losses])


# ---------------------------------------------------------------------------- decoding


@torch.inference_mode()
def greedy(
    model: Any,
    tokenizer: Any,
    sequences: Sequence[list[int]],
    max_new_tokens: int,
    batch_size: int,
) -> list[tuple[list[int], bool]]:
    """Continues each sequence by the most likely tokens. Returns the new tokens before the first
    end token, and whether there is one within `max_new_tokens`."""
    from transformers import GenerationConfig

    padding, ends = pad_id(tokenizer), end_token_ids(model, tokenizer)
    settings = GenerationConfig(  # type: ignore[no-untyped-call]  # untyped in transformers
        do_sample=False, max_new_tokens=max_new_tokens, pad_token_id=padding, eos_token_id=ends
    )
    # `generate` fills what its settings leave open (repetition_penalty, no_repeat_ngram_size, ...)
    # from the configuration that the base ships, so that one is taken away.
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    shipped, base.generation_config = getattr(base, "generation_config", None), settings
    found: list[tuple[list[int], bool]] = [([], False)] * len(sequences)
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))  # little padding
    try:
        for first in range(0, len(order), batch_size):
            indices = order[first : first + batch_size]
            length = max(len(sequences[i]) for i in indices)
            ids = torch.full((len(indices), length), padding)  # padded on the left
            attention = torch.zeros_like(ids)
            for row, i in enumerate(indices):
                ids[row, length - len(sequences[i]) :] = torch.tensor(sequences[i])
                attention[row, length - len(sequences[i]) :] = 1
            generated = base.generate(
                input_ids=ids.to(model.device),
                attention_mask=attention.to(model.device),
                generation_config=settings,
            )
            for i, new in zip(indices, generated[:, length:].tolist(), strict=True):
                end = next((at for at, token in enumerate(new) if token in ends), None)
                found[i] = (new[:end], end is not None)
    finally:
        base.generation_config = shipped
    return found


def end_token_ids(model: Any, tokenizer: Any) -> list[int]:
    """Returns every token that ends an answer: those of the tokenizer and its chat template, and
    those of the generation configuration that the base ships."""
    shipped = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    several = shipped if isinstance(shipped, list | tuple) else [shipped]
    return sorted({*end_ids(tokenizer), *(one for one in several if one is not None)})


# ---------------------------------------------------------------------------- the harness


def lm_eval_commands(
    task: str,
    adapter: Path | None,
    base_model: str | None,
    batch_size: int,
    limit: int | None,
    trust_remote_code: bool,
) -> list[str]:
    """Returns the command lines by which lm-evaluation-harness evaluates the base and, if there is
    one, the adapter, which has to be a PEFT directory, or a run with one.

    `task` is the name of a dataset, whose `-` are `_` in the harness. Raises UsageError for another
    form of the adapter, and if the base is not known.
    """
    peft = None
    if adapter:
        peft = next((d for d in (adapter, adapter / "adapter") if weights_in(d)), None)
        if peft is None:
            raise UsageError(
                f"{adapter}: lm-evaluation-harness reads PEFT directories; make one: loragen lora "
                f"export {adapter} --output DIR"
            )
        base_model = base_model or read_config(peft).get("base_model_name_or_path")
    if not base_model:
        raise UsageError("--base-model: no base model is recorded; give one")
    base = absolute_base(resolve_base(base_model))
    arguments = f"pretrained={base}"
    if is_gguf(base):
        arguments = f"pretrained={Path(base).parent},gguf_file={Path(base).name}"
    if trust_remote_code:
        arguments += ",trust_remote_code=True"
    rest = ["--tasks", task.replace("-", "_"), "--apply_chat_template"]
    rest += ["--batch_size", str(batch_size), *(("--limit", str(limit)) if limit else ())]
    models = [arguments, *([f"{arguments},peft={peft.absolute()}"] if peft else [])]
    return [shlex.join(["lm_eval", "--model", "hf", "--model_args", one, *rest]) for one in models]
