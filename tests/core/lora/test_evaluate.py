from types import SimpleNamespace

import pytest
import torch
from torch import nn

from loragen.core.data.dataset import Dataset, Row
from loragen.core.data.tokenize import answer_ids, pad_id, prompt_ids, tokenize_row
from loragen.core.lora.evaluate import choice_accuracy, evaluate_model, generate, log_likelihoods
from loragen.core.lora.packing import answer_losses, collate


def row(prompt, response, **more):
    return Row(prompt=prompt, response=response, line=1, **more)


class Oracle(nn.Module):
    """A model that gives a fixed answer to every known prompt.

    Its likelihoods prefer the same tokens, by a little.
    """

    device = torch.device("cpu")

    def __init__(self, tokenizer, answers):
        super().__init__()
        self.answers = [
            (prompt_ids(tokenizer, prompt), answer_ids(tokenizer, answer))
            for prompt, answer in answers.items()
        ]
        self.end, self.size = tokenizer.eos_token_id, len(tokenizer)
        self.head = nn.Identity()

    def get_output_embeddings(self):
        return self.head

    def next_token(self, ids):
        for prompt, answer in self.answers:
            for length in range(len(answer)):
                if ids[len(ids) - len(prompt) - length :] == [*prompt, *answer[:length]]:
                    return answer[length]
        return self.end

    def forward(self, input_ids, attention_mask, use_cache=False):
        logits = torch.zeros(*input_ids.shape, self.size)
        for r, ids in enumerate(input_ids.tolist()):
            for t in range(len(ids)):
                logits[r, t, self.next_token(ids[: t + 1])] = 1.0
        return SimpleNamespace(logits=self.head(logits))

    def generate(self, input_ids, attention_mask, max_new_tokens, **_):
        rows = [list(map(int, ids)) for ids in input_ids]
        for _ in range(max_new_tokens):
            for ids in rows:
                ids.append(self.next_token(ids))
        return torch.tensor(rows)


@pytest.fixture
def oracle(tokenizer):
    return lambda answers: Oracle(tokenizer, answers)


def test_exact_match_is_the_share_of_rows_answered_as_labelled(tokenizer, oracle):
    rows = [row("a", "red"), row("bb", "green cat"), row("ccc", " blue "), row("d", "dog")]
    model = oracle({"a": "red", "bb": "green cat", "ccc": "blue", "d": "dogs"})
    scores = evaluate_model(model, tokenizer, rows, batch_size=3)
    assert scores.exact_match == 0.75
    assert (scores.rows, scores.choice_accuracy, scores.choices) == (4, None, None)
    assert scores.as_dict()["exact_match"] == 0.75


def test_generation_gives_the_answers_in_the_order_of_rows(tokenizer, oracle):
    answers = {"a": "red", "a much longer prompt": "blue", "cc": "cat"}
    rows = [row(prompt, answer) for prompt, answer in answers.items()]
    for size in (1, 2, 32):
        assert generate(oracle(answers), tokenizer, rows, size) == list(answers.values())


def test_left_padding_does_not_change_what_is_generated(base):
    """Left padding must not change what is generated."""
    rows = [row("q" * n, "some longer answer") for n in (1, 7, 20, 3)]
    together = generate(base.model, base.tokenizer, rows, 4)
    assert together == generate(base.model, base.tokenizer, rows, 1)


def test_a_trained_adapter_is_measured_on_its_own_rows(train_lora, base, dataset):
    """One answer to everything is learned in seconds: a score whose value is known."""
    from loragen.core.adapter.files import attach_adapter, read_adapter

    file = dataset([{"prompt": f"q {i}", "response": "blue"} for i in range(4)])
    rows = Dataset(file).rows()
    assert evaluate_model(base.model, base.tokenizer, rows).exact_match == 0.0
    run = train_lora(
        {
            "training.max_steps": 60,
            "schedule.stage1_steps": 60,
            "schedule.learning_rate_stage1": 3e-2,
            "checkpoints.first_step": 60,
        },
        file=file,
    )
    model = attach_adapter(base.model, read_adapter(run.directory / "adapter"), "x")
    assert evaluate_model(model, base.tokenizer, rows).exact_match == 1.0


def test_choice_accuracy_is_of_the_most_likely_choice(tokenizer, oracle):
    choices = ["red", "green", "blue"]
    rows = [
        row("a", "red", choices=choices),
        row("b", "green", choices=choices),
        row("c", "cat", choices=["cat", "dog"]),
    ]
    model = oracle({"a": "red", "b": "blue", "c": "cat"})
    assert choice_accuracy(model, tokenizer, rows, None, 2) == pytest.approx(2 / 3)
    scores = evaluate_model(model, tokenizer, rows)
    assert scores.choice_accuracy == pytest.approx(2 / 3)
    assert scores.choices is None


def test_choice_accuracy_falls_back_to_the_closed_set_of_answers(tokenizer, oracle):
    rows = [row(f"p{i}", answer) for i, answer in enumerate(["cat", "dog", "cat", "dog"])]
    model = oracle({"p0": "cat", "p1": "dog", "p2": "dog", "p3": "cat"})
    scores = evaluate_model(model, tokenizer, rows)
    assert (scores.choice_accuracy, scores.choices) == (0.5, 2)
    assert scores.exact_match == 0.5


def test_format_validity_counts_allowed_answers(tokenizer, oracle):
    rows = [
        row(prompt, response) for prompt, response in zip("abcd", ["cat", "dog"] * 2, strict=True)
    ]
    model = oracle({"a": "dog", "b": "dog", "c": " cat", "d": "fox"})
    assert evaluate_model(model, tokenizer, rows).format_validity == 0.75
    chosen = [row("a", "fox", choices=["fox", "cat"]), row("d", "fox", choices=["fox", "cat"])]
    assert evaluate_model(model, tokenizer, chosen).format_validity == 0.5
    assert evaluate_model(model, tokenizer, rows[:1]).format_validity is None
    assert evaluate_model(model, tokenizer, rows[3:], closed=["cat", "dog"]).format_validity == 0.0


def test_without_choices_there_is_no_choice_accuracy(tokenizer, oracle):
    rows = [row("a", "cat"), row("b", "dog")] * 2
    scores = evaluate_model(oracle({}), tokenizer, rows, choices=False)
    assert (scores.choice_accuracy, scores.choices) == (None, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_likelihoods_are_the_sums_of_the_answer_losses(base, dtype):
    base.model.to(dtype)
    rows = [row("a", "red"), row("bb", "green"), row("c" * 20, "x"), row("d", "blue cat")]
    examples = [tokenize_row(base.tokenizer, r, 64).example for r in rows]
    padding = pad_id(base.tokenizer)
    found = log_likelihoods(base.model, examples, padding, batch_size=3)
    with torch.inference_mode():
        wanted = [-answer_losses(base.model, collate([e], padding)).sum() for e in examples]
    assert torch.allclose(found, torch.stack(wanted).float(), atol=1e-5)
    assert (found < 0).all()
