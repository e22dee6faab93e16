import unicodedata
from copy import deepcopy

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loragen.core.data import tokenize
from loragen.core.data.dataset import Row
from loragen.core.data.formats import Turn
from loragen.core.data.tokenize import TokenizedRows, answer_ids, pad_id, prompt_ids, tokenize_row
from loragen.core.errors import DataError


@pytest.fixture
def plain(tokenizer):
    """The same tokenizer without a chat template."""
    copy = deepcopy(tokenizer)
    copy.chat_template = None
    return copy


def row(prompt="Question 1 about red?", response="blue", **more):
    return Row(prompt=prompt, response=response, line=7, **more)


def test_the_chat_template_is_used_where_there_is_one(tokenizer):
    text = tokenizer.decode(prompt_ids(tokenizer, "red"))
    assert text == "<|user|>red<|assistant|>"
    text = tokenizer.decode(prompt_ids(tokenizer, "red", "be short"))
    assert text == "<|system|>be short<|user|>red<|assistant|>"


def test_without_a_template_the_texts_stand_on_lines(plain):
    assert plain.decode(prompt_ids(plain, "red")) == "red\n"
    assert plain.decode(prompt_ids(plain, "red", "be short")) == "be short\nred\n"


def test_the_end_token_is_part_of_the_answer(tokenizer):
    ids = answer_ids(tokenizer, "blue")
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids[:-1]) == "blue"


@pytest.mark.parametrize("kind", ["tokenizer", "plain"])
@pytest.mark.parametrize("system", [None, "be short"])
def test_only_the_answer_and_its_end_are_learned(request, kind, system):
    tokenizer = request.getfixturevalue(kind)
    item = tokenize_row(tokenizer, row(system=system), 64).example
    assert item.ids[-item.answer :] == answer_ids(tokenizer, "blue")
    assert item.ids[: -item.answer] == prompt_ids(tokenizer, row().prompt, system)


@given(st.text("ab ", max_size=12), st.text("xy", min_size=1, max_size=6), st.integers(2, 30))
def test_cut_prompt_and_answer_are_the_whole_row(tokenizer, prompt, response, max_length):
    whole = prompt_ids(tokenizer, prompt), answer_ids(tokenizer, response)
    try:
        parts = tokenize_row(tokenizer, row(prompt, response), max_length)
    except DataError:
        assert len(whole[1]) >= max_length
        return
    assert ([*parts.cut, *parts.prompt], parts.answer) == whole
    assert parts.prompt
    item = tokenize_row(tokenizer, row(prompt, response), max_length).example
    assert item.ids == [*parts.prompt, *parts.answer]
    assert len(item.ids) == (max_length if parts.cut else sum(map(len, whole)))


@pytest.mark.parametrize("room", [1, 2, 5])
def test_a_long_row_loses_the_start_of_its_prompt_never_its_answer(tokenizer, room):
    whole = tokenize_row(tokenizer, row(), 64).example
    cut = tokenize_row(tokenizer, row(), whole.answer + room).example
    assert len(cut.ids) == whole.answer + room
    assert cut.ids == whole.ids[-len(cut.ids) :]
    assert cut.answer == whole.answer


def test_an_answer_that_does_not_fit_is_an_error(tokenizer):
    length = len(answer_ids(tokenizer, "blue"))
    with pytest.raises(DataError, match=f"^the answer has {length} tokens, data.max_length"):
        tokenize_row(tokenizer, row(), length)
    assert len(tokenize_row(tokenizer, row(), length + 1).example.ids) == length + 1


def test_the_end_token_pads_where_there_is_no_padding_token(tokenizer):
    copy = deepcopy(tokenizer)
    assert pad_id(copy) == tokenizer.pad_token_id
    copy.pad_token = None
    assert pad_id(copy) == tokenizer.eos_token_id


@pytest.mark.parametrize(
    "kind, text",
    [
        ("tokenizer", "<|system|>s<|user|>a<|assistant|>b<|user|>red<|assistant|>"),
        ("plain", "s\na\nb\nred\n"),
    ],
)
def test_earlier_turns_are_given_and_only_the_last_answer_is_learned(request, kind, text):
    tokenizer = request.getfixturevalue(kind)
    item = tokenize_row(tokenizer, row("red", system="s", history=(Turn("a", "b"),)), 64).example
    assert tokenizer.decode(item.ids[: -item.answer]) == text
    assert item.ids[-item.answer :] == answer_ids(tokenizer, "blue")


def test_rows_are_tokenised_when_they_are_used(tokenizer, monkeypatch):
    made = []
    monkeypatch.setattr(
        tokenize, "tokenize_row", lambda *args: made.append(args[1].line) or tokenize_row(*args)
    )
    rows = [Row(prompt="x" * 9 * n, response="red", line=n) for n in range(1, 5)]
    examples = TokenizedRows(rows, tokenizer, 30)
    assert (len(examples), made) == (4, [])
    part = examples.subset([3, 0])
    assert part.rows == [rows[3], rows[0]]
    assert part[0] == examples[3] == tokenize_row(tokenizer, rows[3], 30).example
    assert part[:2] == [examples[3], examples[0]]
    assert made == [4, 1]
    assert (examples.num_cut, part.num_cut, examples.subset([0]).num_cut) == (1, 1, 0)


@given(st.lists(st.text(max_size=30), min_size=1, max_size=4), st.integers(4, 24))
def test_rows_whose_answer_does_not_fit_are_left_out(tokenizer, responses, max_length):
    rows = [Row(prompt="p", response=text, line=n) for n, text in enumerate(responses)]
    fit = [len(answer_ids(tokenizer, text)) < max_length for text in responses]
    examples = TokenizedRows(rows, tokenizer, max_length)
    assert examples.rows == [row for row, fits in zip(rows, fit, strict=True) if fits]
    assert [bad.line for bad in examples.too_long] == [n for n, fits in enumerate(fit) if not fits]
    assert [len(example.ids) <= max_length for example in examples] == [True] * len(examples)


def test_normalisation_may_make_an_answer_longer_than_its_bytes():
    """NFKC writes this one character of three bytes with 18 characters."""
    tokenizer = FakeNfkc()
    (bad,) = TokenizedRows([row("p", "\ufdfa")], tokenizer, 12).too_long
    assert bad.line == 7


class FakeNfkc:
    """A token a character, normalised."""

    chat_template, eos_token_id = None, 0

    def __call__(self, text, **options):
        return {"input_ids": [1] * len(unicodedata.normalize("NFKC", text))}
