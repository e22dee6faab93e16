import pytest
from hypothesis import given
from hypothesis import strategies as st

from loragen.core.data.rows import Reading, Row, read
from loragen.core.data.tokenize import Lengths, preview, shared_prefix, tokenize_row
from loragen.core.errors import DataError

sequences = st.lists(st.lists(st.integers(0, 2), max_size=5), min_size=1, max_size=5)


def reading(*pairs, **more):
    rows = [Row(prompt=p, response=r, line=n, **more) for n, (p, r) in enumerate(pairs, start=1)]
    return Reading("d.jsonl", rows, [], {"prompt/response": len(rows)})


@given(sequences)
def test_the_shared_prefix_is_the_longest(sequences):
    length = shared_prefix(sequences)
    assert len({tuple(sequence[:length]) for sequence in sequences}) == 1
    longer = {tuple(sequence[: length + 1]) for sequence in sequences}
    assert len(longer) > 1 or min(map(len, sequences)) == length


@pytest.mark.parametrize("max_length", [64, 20, 12])
def test_it_shows_what_training_sees(tokenizer, max_length):
    found = reading(("Question 1 about red?", "blue"), ("Question 2 about a much longer?", "red"))
    result = preview(tokenizer, found, max_length, 2)
    for row, sample in zip(found.rows, result.samples, strict=True):
        item = tokenize_row(tokenizer, row, max_length).example
        assert sample.prompt == tokenizer.decode(item.ids[: -item.answer])
        assert sample.answer == f"{row.response}<|end|>"
        assert sample.cut + sample.prompt == f"<|user|>{row.prompt}<|assistant|>"


def test_lengths_are_counted(tokenizer):
    found = reading(*(("a" * n, "b") for n in range(1, 101)))
    result = preview(tokenizer, found, 50, 0)
    # the prompt, its two marks, the answer and its end
    assert result.row_tokens == Lengths(9, 54, 99, 104)
    assert result.answer_tokens == Lengths(2, 2, 2, 2)
    assert (result.rows, result.rows_cut) == (100, 54)
    assert result.tokens_cut == sum(range(1, 55))
    assert result.samples == []


def test_the_shared_prefix_is_that_of_the_prompts_as_they_are_cut(tokenizer):
    pairs = ("zzz1", "x"), ("zzz2", "x")
    assert preview(tokenizer, reading(*pairs), 64, 0).shared_prefix == 4  # <|user|>zzz
    assert preview(tokenizer, reading(*pairs, system="s"), 64, 0).shared_prefix == 6
    assert preview(tokenizer, reading(*pairs), 4, 0).shared_prefix == 0


def test_an_answer_that_does_not_fit_makes_a_bad_row(tokenizer):
    result = preview(tokenizer, reading(("p", "x" * 20), ("p", "x")), 10, 3)
    assert result.rows == 1
    assert [sample.line for sample in result.samples] == [2]
    assert result.bad_rows == [(1, "the answer has 21 tokens, data.max_length is 10")]
    with pytest.raises(DataError, match=r"d\.jsonl:1: the answer has 21 tokens, data\.max_length"):
        preview(tokenizer, reading(("p", "x" * 20)), 10, 3)


def test_real_data_leaves_nothing_out(shared):
    from loragen.core.base.load import load_tokenizer

    tokenizer = load_tokenizer(str(shared / "models" / "qwen2.5-0.5b-config"))
    file = shared / "data_to_lora" / "cs" / "arc-easy" / "arc-easy_test_formatted.jsonl"
    found = read(file)
    result = preview(tokenizer, found, 1024, 1)
    assert result.formats == {"prompt/response": result.rows}
    assert (result.rows_cut, result.bad_rows) == (0, [])
    assert result.shared_prefix > 20  # the system text
    assert result.samples[0].answer == f"{found.rows[0].response}<|im_end|>"
