import unicodedata
from copy import deepcopy

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loragen.core.data import tokenize
from loragen.core.data.chat import answer_ids, pad_id, prompt_ids
from loragen.core.data.dataset import Dataset, Row
from loragen.core.data.formats import Turn
from loragen.core.data.preview import Lengths, preview
from loragen.core.data.tokenize import TokenizedRows, shared_prefix, tokenize_row
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
    assert item.ids[-item.num_label_tokens :] == answer_ids(tokenizer, "blue")
    assert item.ids[: -item.num_label_tokens] == prompt_ids(tokenizer, row().prompt, system)


@given(st.text("ab ", max_size=12), st.text("xy", min_size=1, max_size=6), st.integers(2, 30))
def test_cut_prompt_and_answer_are_the_whole_row(tokenizer, prompt, response, max_length):
    whole = prompt_ids(tokenizer, prompt), answer_ids(tokenizer, response)
    marks = len(prompt_ids(tokenizer, ""))
    try:
        parts = tokenize_row(tokenizer, row(prompt, response), max_length)
    except DataError:
        assert marks + len(whole[1]) >= max_length
        return
    assert ([*parts.before, *parts.cut, *parts.after], parts.answer) == whole
    item = parts.example
    assert item.ids == [*parts.before, *parts.after, *parts.answer]
    assert len(item.ids) == (max_length if parts.cut else sum(map(len, whole)))


@pytest.mark.parametrize("kind", ["tokenizer", "plain"])
@pytest.mark.parametrize("system", [None, "be short"])
@pytest.mark.parametrize("room", [1, 2, 5])
def test_a_long_row_loses_the_middle_of_its_text_alone(request, kind, system, room):
    tokenizer = request.getfixturevalue(kind)
    text = "0123456789"
    around = len(prompt_ids(tokenizer, "", system)) + len(answer_ids(tokenizer, "blue"))
    parts = tokenize_row(tokenizer, row(text, system=system), around + room)
    kept = f"{text[: (room + 1) // 2]}{text[len(text) - room // 2 :]}"
    assert parts.prompt == prompt_ids(tokenizer, kept, system)
    assert tokenizer.decode(parts.cut) == text[(room + 1) // 2 : len(text) - room // 2]
    assert len(parts.example.ids) == around + room
    with pytest.raises(DataError, match=r"no room for the prompt, data\.max_length is"):
        tokenize_row(tokenizer, row(text, system=system), around)


def test_a_long_conversation_loses_its_oldest_turns_first(tokenizer):
    turns = (Turn("a" * 9, "b"), Turn("cc", "d"), Turn("e", "f"))
    long = row("012", system="s", history=turns)

    def length(history, prompt="012"):
        return len(prompt_ids(tokenizer, prompt, "s", history)) + len(answer_ids(tokenizer, "blue"))

    assert tokenize_row(tokenizer, long, length(turns)).cut == []
    parts = tokenize_row(tokenizer, long, length(turns) - 1)
    assert parts.prompt == prompt_ids(tokenizer, "012", "s", turns[1:])
    whole = prompt_ids(tokenizer, "012", "s", turns)
    assert [*parts.before, *parts.cut, *parts.after] == whole
    parts = tokenize_row(tokenizer, long, length(turns[2:]))
    assert parts.prompt == prompt_ids(tokenizer, "012", "s", turns[2:])
    parts = tokenize_row(tokenizer, long, length((), "02"))
    assert parts.prompt == prompt_ids(tokenizer, "02", "s")


def test_an_answer_that_does_not_fit_is_an_error(tokenizer):
    length = len(answer_ids(tokenizer, "blue"))
    with pytest.raises(DataError, match=f"{length} tokens.*max_length"):
        tokenize_row(tokenizer, row(), length)


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
    assert tokenizer.decode(item.ids[: -item.num_label_tokens]) == text
    assert item.ids[-item.num_label_tokens :] == answer_ids(tokenizer, "blue")


def test_rows_are_tokenised_when_they_are_used(tokenizer, monkeypatch):
    made = []
    monkeypatch.setattr(
        tokenize, "tokenize_row", lambda *args: made.append(args[1].line) or tokenize_row(*args)
    )
    rows = [Row(prompt="x" * 9 * n, response="red", line=n) for n in range(1, 5)]
    examples = TokenizedRows(rows, tokenizer, 30)
    assert (len(examples), made) == (4, [])
    part = examples.subset([3, 0])
    assert list(part.rows) == [rows[3], rows[0]]
    assert part[0] == examples[3] == tokenize_row(tokenizer, rows[3], 30).example
    assert part[:2] == [examples[3], examples[0]]
    assert made == [4, 1]
    assert [examples.is_cut(index) for index in (0, 3)] == [False, True]
    assert [part.is_cut(index) for index in (0, 1)] == [True, False]
    assert made == [4, 1]


def test_the_longest_rows_are_found_without_a_tokenizer():
    rows = [
        row("a" * 5, "r"),
        row("a", "r" * 9),
        row("a", "r", system="s" * 7),
        row("a", "r", history=(Turn("h" * 3, "h" * 3),)),
    ]
    examples = TokenizedRows(rows, FakeNfkc(), 64)
    assert examples.longest(range(4), 3) == [1, 2, 3]
    assert examples.longest([3, 0], 3) == [3, 0]
    assert examples.subset([2, 1]).longest(range(2), 1) == [1]


def test_few_rows_stay_in_memory_as_tokens(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenize, "MAX_CACHED", 2)
    made = []
    monkeypatch.setattr(
        tokenize, "tokenize_row", lambda *args: made.append(args[1].line) or tokenize_row(*args)
    )
    rows = [Row(prompt="x", response="red", line=n) for n in range(4)]
    examples = TokenizedRows(rows, tokenizer, 30)
    assert list(examples) == [tokenize_row(tokenizer, one, 30).example for one in rows]
    assert [examples[3], examples[2]]
    assert made == [0, 1, 2, 3]
    assert examples[0]
    assert made[4:] == [0]


@given(st.lists(st.text(max_size=30), min_size=1, max_size=4), st.integers(4, 24))
def test_rows_whose_answer_does_not_fit_are_left_out(tokenizer, responses, max_length):
    rows = [Row(prompt="p", response=text, line=n) for n, text in enumerate(responses)]
    around = len(prompt_ids(tokenizer, "p"))
    fit = [around + len(answer_ids(tokenizer, text)) <= max_length for text in responses]
    examples = TokenizedRows(rows, tokenizer, max_length)
    assert list(examples.rows) == [row for row, fits in zip(rows, fit, strict=True) if fits]
    assert [bad.line for bad in examples.left_out] == [n for n, fits in enumerate(fit) if not fits]
    assert [len(example.ids) <= max_length for example in examples] == [True] * len(examples)


def test_normalisation_may_make_an_answer_longer_than_its_bytes():
    """NFKC writes this one character of three bytes with 18 characters."""
    tokenizer = FakeNfkc()
    (bad,) = TokenizedRows([row("p", "\ufdfa")], tokenizer, 12).left_out
    assert bad.line == 7


class FakeNfkc:
    """A token a character, normalised."""

    chat_template, eos_token_id = None, 0

    def __len__(self):
        return 2

    def __call__(self, text, **options):
        return {"input_ids": [1] * len(unicodedata.normalize("NFKC", text))}


sequences = st.lists(st.lists(st.integers(0, 2), max_size=5), min_size=1, max_size=5)


@pytest.fixture
def opened(dataset):
    """`opened((prompt, answer), ...)`: a dataset of these rows."""

    def write(*pairs, **more):
        rows = [{"prompt": prompt, "response": answer, **more} for prompt, answer in pairs]
        return Dataset(dataset(rows, "d.jsonl"))

    return write


@given(sequences)
def test_the_shared_prefix_is_the_longest(sequences):
    length = shared_prefix(sequences)
    assert len({tuple(sequence[:length]) for sequence in sequences}) == 1
    longer = {tuple(sequence[: length + 1]) for sequence in sequences}
    assert len(longer) > 1 or min(map(len, sequences)) == length


@pytest.mark.parametrize("max_length", [64, 20, 12])
def test_it_shows_what_training_sees(tokenizer, opened, max_length):
    found = opened(("Question 1 about red?", "blue"), ("Question 2 about a much longer?", "red"))
    result = preview(tokenizer, found, max_length, 2)
    for row, sample in zip(found.rows(), result.samples, strict=True):
        item = tokenize_row(tokenizer, row, max_length).example
        assert sample.prompt == tokenizer.decode(item.ids[: -item.num_label_tokens])
        assert sample.answer == f"{row.response}<|end|>"
        start, end = sample.prompt[: sample.cut_at], sample.prompt[sample.cut_at :]
        assert start + sample.cut + end == f"<|user|>{row.prompt}<|assistant|>"


def test_lengths_are_counted(tokenizer, opened):
    found = opened(*(("a" * n, "b") for n in range(1, 101)))
    result = preview(tokenizer, found, 50, 0)
    # the prompt, its two marks, the answer and its end
    assert result.row_tokens == Lengths(9, 54, 99, 104)
    assert result.answer_tokens == Lengths(2, 2, 2, 2)
    assert (result.rows, result.rows_cut) == (100, 54)
    assert result.tokens_cut == sum(range(1, 55))
    assert result.samples == []


def test_the_shared_prefix_is_that_of_the_prompts_as_they_are_cut(tokenizer, opened):
    pairs = ("zzz1", "x"), ("zzz2", "x")
    assert preview(tokenizer, opened(*pairs), 64, 0).shared_prefix == 4  # <|user|>zzz
    assert preview(tokenizer, opened(*pairs, system="s"), 64, 0).shared_prefix == 6
    assert preview(tokenizer, opened(*pairs), 6, 0).shared_prefix == 2  # <|user|>z, of z1 and z2


def test_an_answer_that_does_not_fit_makes_a_bad_row(tokenizer, opened):
    result = preview(tokenizer, opened(("p", "x" * 20), ("p", "x")), 10, 3)
    assert result.rows == 1
    assert [sample.line for sample in result.samples] == [2]
    assert result.bad_rows == [(1, "the answer has 21 tokens, data.max_length is 10")]
    with pytest.raises(DataError, match=r"d\.jsonl:1: .*21 tokens"):
        preview(tokenizer, opened(("p", "x" * 20)), 10, 3)


def test_real_data_leaves_nothing_out(shared):
    from loragen.core.base.load import load_tokenizer

    tokenizer = load_tokenizer(str(shared / "models" / "qwen2.5-0.5b-config"))
    file = shared / "data_to_lora" / "cs" / "arc-easy" / "arc-easy_test_formatted.jsonl"
    found = Dataset(file)
    result = preview(tokenizer, found, 1024, 1)
    assert result.formats == {"prompt/response": result.rows}
    assert (result.rows_cut, result.bad_rows) == (0, [])
    assert result.shared_prefix > 20  # the system text
    assert result.samples[0].answer == f"{found.rows()[0].response}<|im_end|>"
