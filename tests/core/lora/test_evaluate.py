from collections import Counter
from copy import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from loragen.core.data.chat import answer_ids, pad_id, prompt_ids
from loragen.core.data.dataset import Dataset, Row
from loragen.core.data.tokenize import tokenize_row
from loragen.core.lora.evaluate import (
    TestRows,
    answer_predictions,
    evaluate_model,
    greedy,
    log_likelihoods,
    normalized,
)
from loragen.core.lora.packing import answer_losses, collate


def generate(model, tokenizer, rows, batch_size):
    """The greedy answers as texts, each of at most as many tokens as the longest response."""
    prompts = [prompt_ids(tokenizer, row.prompt, row.system, row.history) for row in rows]
    longest = max(len(answer_ids(tokenizer, row.response)) for row in rows)
    found = greedy(model, tokenizer, prompts, longest, batch_size)
    return [tokenizer.decode(ids, skip_special_tokens=True) for ids, _ in found]


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

    def generate(self, input_ids, attention_mask, generation_config):
        rows = [list(map(int, ids)) for ids in input_ids]
        for _ in range(generation_config.max_new_tokens):
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


def test_any_answer_that_is_right_counts(tokenizer, oracle):
    """Also one that begins as none of the responses, or as one of them does."""
    also = {"also_right": ("green cat", "dog")}
    rows = [row(prompt, "green", **also) for prompt in "abcd"]
    model = oracle({"a": "green", "b": "green cat", "c": "dog", "d": "cat"})
    assert evaluate_model(model, tokenizer, rows).hits == (True, True, True, False)
    chosen = [row("a", "cat", choices=["dog", "cat", "fox"], also_right=("dog",))]
    scores = evaluate_model(oracle({"a": "dog"}), tokenizer, chosen)
    assert (scores.exact_match, scores.choice_accuracy, scores.format_validity) == (1, 1, 1)


def shipping(model, **settings):
    """The model, with a generation configuration that its authors could have shipped."""
    from transformers import GenerationConfig

    model.generation_config = GenerationConfig(**settings)
    return model


SHIPPED = (
    {"repetition_penalty": 3.0},
    {"no_repeat_ngram_size": 1},
    {"do_sample": True, "temperature": 5.0},
    {"num_beams": 3},
    {"suppress_tokens": list(range(100))},
)


@pytest.mark.parametrize("settings", SHIPPED)
def test_greedy_is_greedy_whatever_the_base_ships(base, settings):
    """The argmax of one forward pass after another, without a cache and without padding."""
    rows = [row("q" * n, "some longer answer") for n in (1, 7, 20, 3)]
    tokenizer, model = base.tokenizer, base.model
    expected = []
    for one in rows:
        ids = prompt_ids(tokenizer, one.prompt)
        start, end = len(ids), len(ids) + len(answer_ids(tokenizer, one.response))
        while len(ids) < end and ids[-1] != tokenizer.eos_token_id:
            with torch.inference_mode():
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        expected.append(tokenizer.decode(ids[start:], skip_special_tokens=True))
    shipped = shipping(model, **settings).generation_config
    assert generate(model, tokenizer, rows, 3) == expected
    assert model.generation_config is shipped


def test_exact_match_is_that_of_decoding_every_answer(base):
    """Rows are answered by one forward pass where that decides, and decoded where it does not."""
    tokenizer, model = base.tokenizer, base.model
    asked = [row("x" * n, "-") for n in range(1, 13)]
    prompts = [prompt_ids(tokenizer, one.prompt) for one in asked]
    long = [ids for ids, _ in greedy(model, tokenizer, prompts, 20, 12)]
    counts = Counter(token for ids in long for token in set(ids))
    some = next(token for token, count in counts.most_common() if count < 12)
    shipping(model, eos_token_id=[tokenizer.eos_token_id, some])  # so that some answers end
    decoded = greedy(model, tokenizer, prompts, 20, 12)
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids, _ in decoded]
    ended = [end for _, end in decoded]
    assert 0 < sum(ended) < 12
    labels = [text if n % 3 else text[:-1] for n, text in enumerate(texts)]
    rows = [replace(one, response=label or "-") for one, label in zip(asked, labels, strict=True)]
    expected = tuple(
        end and normalized(text) == normalized(one.response)
        for end, text, one in zip(ended, texts, rows, strict=True)
    )
    assert evaluate_model(model, tokenizer, rows).hits == expected
    assert 0 < sum(expected) < sum(ended)


@pytest.mark.parametrize("where", ["generation config", "chat template"])
def test_every_end_token_of_the_base_ends_an_answer(tokenizer, oracle, where):
    """Models of the field end a turn with another token than the tokenizer's end token."""
    turn = "<|user|>"  # any special token may be the end of a turn
    ours = copy(tokenizer)
    model = oracle({"a": f"red{turn} and more", "b": f"green cat{turn}cat"})
    rows = [row("a", "red"), row("b", "green cat")]
    assert evaluate_model(model, ours, rows).exact_match == 0.0
    if where == "chat template":
        ours.chat_template = tokenizer.chat_template.replace(
            "{% endfor %}",
            "{% if message['role'] == 'assistant' %}{{ '<|user|>' }}{% endif %}{% endfor %}",
        )
    else:
        ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(turn)]
        shipping(model, eos_token_id=ends)
    assert evaluate_model(model, ours, rows).exact_match == 1.0


def test_answers_are_compared_in_a_normal_form():
    assert normalized(" \uff21\u00a0 b\tc\n") == "A b c"
    assert normalized("red.") != normalized("red") != normalized("Red")
    assert normalized("red. !", True) == normalized("red\u3002", True) == "red"
    assert normalized("a.b", True) == "a.b"
    assert normalized("?", True) == "?"


@given(st.text(), st.booleans())
def test_the_normal_form_of_a_normal_form_is_itself(text, ignored):
    once = normalized(text, ignored)
    assert normalized(once, ignored) == once


def test_final_punctuation_counts_unless_it_is_to_be_ignored(tokenizer, oracle):
    rows = [row("a", "red"), row("b", "cat")] * 2
    model = oracle({"a": "red.", "b": "ca.t"})
    assert evaluate_model(model, tokenizer, rows).exact_match == 0.0
    lenient = evaluate_model(model, tokenizer, rows, ignore_final_punctuation=True)
    assert lenient.exact_match == lenient.format_validity == 0.5


def test_an_answer_that_goes_on_is_not_the_response(tokenizer, oracle):
    rows = [row("a", "red"), row("b", "cat")]
    model = oracle({"a": "red\nblue", "b": "cat\n"})
    assert evaluate_model(model, tokenizer, rows).hits == (False, True)


def test_the_loss_is_the_mean_over_the_tokens_of_all_responses(base):
    rows = [row("a", "red"), row("bb", "green cat"), row("c" * 20, "x")]
    examples = [tokenize_row(base.tokenizer, r, 64).example for r in rows]
    with torch.inference_mode():
        batch = collate(examples, pad_id(base.tokenizer))
        wanted = answer_losses(base.model, batch).mean().item()
    for size in (1, 2, 32):
        found = evaluate_model(base.model, base.tokenizer, rows, size).loss
        assert found == pytest.approx(wanted, abs=1e-5)


def test_packed_rows_have_the_scores_of_padded_ones(base):
    """In the order of the rows, whatever sequences they are packed into."""
    rows = [row("the same beginning " + "x" * n, f"answer {n}") for n in (9, 1, 5, 0, 7, 3, 2)]
    padded, packed = TestRows(base.tokenizer, rows), TestRows(base.tokenizer, rows)
    packed.pack(base.model, 4)
    assert packed.cost
    examples, padding = padded.examples, pad_id(base.tokenizer)
    wanted = answer_predictions(base.model, examples, padding, 4)
    found = answer_predictions(base.model, examples, padding, 4, packed.cost)
    assert found[1] == wanted[1]
    for one, other in zip(found[0], wanted[0], strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    assert packed.score(base.model).loss == pytest.approx(padded.score(base.model).loss, abs=1e-5)


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
    scores = evaluate_model(model, tokenizer, rows, batch_size=2)
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


def test_few_rows_of_a_dataset_with_free_answers_have_free_answers(tokenizer, oracle):
    """Alone, these four rows would look like a closed set."""
    rows = [
        row(prompt, response) for prompt, response in zip("abcd", ["cat", "dog"] * 2, strict=True)
    ]
    scores = evaluate_model(oracle({"a": "cat"}), tokenizer, rows, closed=[])
    assert (scores.choice_accuracy, scores.format_validity, scores.choices) == (None, None, None)


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
