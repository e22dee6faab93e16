from copy import deepcopy

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loragen.core.data.formats import Turn
from loragen.core.data.rows import Row
from loragen.core.data.tokenize import answer_ids, in_parts, learned, pad_id, prompt_ids
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
    item = learned(in_parts(tokenizer, row(system=system), 64))
    assert item.ids[-item.answer :] == answer_ids(tokenizer, "blue")
    assert item.ids[: -item.answer] == prompt_ids(tokenizer, row().prompt, system)


@given(st.text("ab ", max_size=12), st.text("xy", min_size=1, max_size=6), st.integers(2, 30))
def test_a_row_in_parts_is_the_row(tokenizer, prompt, response, max_length):
    whole = prompt_ids(tokenizer, prompt), answer_ids(tokenizer, response)
    try:
        parts = in_parts(tokenizer, row(prompt, response), max_length)
    except DataError:
        assert len(whole[1]) >= max_length
        return
    assert ([*parts.cut, *parts.prompt], parts.answer) == whole
    assert parts.prompt
    item = learned(in_parts(tokenizer, row(prompt, response), max_length))
    assert item.ids == [*parts.prompt, *parts.answer]
    assert len(item.ids) == (max_length if parts.cut else sum(map(len, whole)))


@pytest.mark.parametrize("room", [1, 2, 5])
def test_a_long_row_loses_the_start_of_its_prompt_never_its_answer(tokenizer, room):
    whole = learned(in_parts(tokenizer, row(), 64))
    cut = learned(in_parts(tokenizer, row(), whole.answer + room))
    assert len(cut.ids) == whole.answer + room
    assert cut.ids == whole.ids[-len(cut.ids) :]
    assert cut.answer == whole.answer


def test_an_answer_that_does_not_fit_is_an_error(tokenizer):
    length = len(answer_ids(tokenizer, "blue"))
    with pytest.raises(DataError, match=f"^the answer has {length} tokens, data.max_length"):
        learned(in_parts(tokenizer, row(), length))
    assert len(learned(in_parts(tokenizer, row(), length + 1)).ids) == length + 1


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
    item = learned(in_parts(tokenizer, row("red", system="s", history=(Turn("a", "b"),)), 64))
    assert tokenizer.decode(item.ids[: -item.answer]) == text
    assert item.ids[-item.answer :] == answer_ids(tokenizer, "blue")
