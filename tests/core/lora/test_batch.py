import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loragen.core.data.tokenize import Example
from loragen.core.lora.packing import (
    IGNORED,
    PADDING,
    PREFIX,
    Cost,
    balanced_bins,
    block_mask,
    cheapest_bins,
    num_answers,
    packed,
    padded,
    shared_prefix_length,
)

PAD = 99
TOKENS = st.lists(st.integers(0, 3), min_size=1, max_size=8)  # few, so that prefixes are shared
COSTS = st.builds(Cost, st.floats(0.0, 100.0), st.floats(0.0, 100.0))
LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=20)


@st.composite
def examples(draw):
    """Rows of a dataset: some begin alike, some are equal."""
    prefix = draw(st.lists(st.integers(0, 3), max_size=6))
    rows = []
    for _ in range(draw(st.integers(1, 9))):
        answer = draw(TOKENS)
        rows.append(Example([*prefix, *draw(TOKENS), *answer], len(answer)))
    return rows


def rows_of(batch):
    """(ids, positions, targets) of every row, as the model meets them: a prefix, then its own."""
    found = []
    for ids, positions, segments, targets in zip(*batch[:4], strict=True):
        own = [s for s in segments.unique().tolist() if s > PREFIX] or [PREFIX]
        for segment in own:
            mine = (segments == PREFIX) | (segments == segment)
            found.append(tuple(t[mine].tolist() for t in (ids, positions, targets)))
    return sorted(found)


def wanted_of(examples):
    rows = []
    for item in examples:
        targets = [IGNORED] * len(item.ids)
        start = len(item.ids) - item.answer
        targets[start - 1 : -1] = item.ids[start:]
        rows.append((item.ids, list(range(len(item.ids))), targets))
    return sorted(rows)


@given(examples(), COSTS)
def test_every_row_can_be_had_back(rows, cost):
    for batch in (padded(rows, PAD), packed(rows, PAD, cost)):
        assert rows_of(batch) == wanted_of(rows)
        assert int((batch.targets != IGNORED).sum()) == num_answers(rows) == batch.step_answers
    assert packed(rows, PAD, cost).packed
    assert not padded(rows, PAD).packed


@given(examples(), COSTS)
def test_padding_is_at_the_end_and_is_nothing(rows, cost):
    for batch in (padded(rows, PAD), packed(rows, PAD, cost)):
        padding = batch.segments == PADDING
        assert (batch.ids[padding] == PAD).all()
        assert (batch.targets[padding] == IGNORED).all()
        ends = (~padding).sum(1)
        assert int(ends.max()) == padding.shape[1]  # some sequence needs the whole length
        for row, end in zip(padding, ends.tolist(), strict=True):
            assert not row[:end].any()


@given(examples(), COSTS)
def test_a_token_sees_what_it_would_see_alone(rows, cost):
    """All of its row so far, at the same positions; and nothing of another row."""
    batch = packed(rows, PAD, cost)
    mask = block_mask(batch.segments)
    count, length = batch.ids.shape
    assert mask.shape == (count, 1, length, length)
    assert mask.dtype == torch.bool
    assert mask.any(-1).all()  # a query that sees nothing gives NaN
    for sequence in range(count):
        for query in range(length):
            seen = mask[sequence, 0, query]
            segment = int(batch.segments[sequence, query])
            if segment == PADDING:
                continue
            assert set(batch.segments[sequence, seen].tolist()) <= {PREFIX, segment}
            place = int(batch.positions[sequence, query])
            assert batch.positions[sequence, seen].tolist() == list(range(place + 1))


@given(examples())
def test_the_prefix_is_the_longest_that_leaves_every_row_its_last_prompt_token(rows):
    shared = shared_prefix_length(rows)
    prompts = [len(item.ids) - item.answer for item in rows]
    assert 0 <= shared < min(prompts)
    heads = {tuple(item.ids[:shared]) for item in rows}
    assert len(heads) == 1
    longer = {tuple(item.ids[: shared + 1]) for item in rows}
    assert len(longer) > 1 or shared == min(prompts) - 1


def test_equal_rows_are_each_their_own():
    row = Example([1, 2, 3, 4, 5], 2)
    batch = packed([row] * 3, PAD, Cost(token=1.0, pair=0.0))
    assert batch.ids.tolist() == [[1, 2, 3, 4, 5, 3, 4, 5, 3, 4, 5]]
    assert batch.segments.tolist() == [[0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 4, 2, 3, 4, 2, 3, 4]]
    assert batch.targets.tolist() == [[-100, -100, 4, 5, -100, 4, 5, -100, 4, 5, -100]]


def test_a_single_row():
    row = Example([1, 2, 3], 1)
    for batch in (packed([row], PAD, Cost(1.0, 1.0)), padded([row], PAD)):
        assert batch.ids.tolist() == [[1, 2, 3]]
        assert batch.targets.tolist() == [[-100, 3, -100]]


@pytest.mark.parametrize("pad", [padded, lambda *a: packed(a[0], a[1], Cost(1.0, 1.0), *a[2:])])
def test_the_num_answers_the_step_are_those_given(pad):
    rows = [Example([1, 2, 3], 1), Example([1, 5, 6, 7], 2)]
    assert pad(rows, PAD).step_answers == 3
    assert pad(rows, PAD, 12).step_answers == 12


def test_moving_keeps_everything():
    batch = packed([Example([1, 2, 3], 1)] * 2, PAD, Cost(1.0, 1.0), 7)
    moved = batch.to(torch.device("cpu"))
    assert (moved.step_answers, moved.packed) == (7, True)
    assert all(a.equal(b) for a, b in zip(moved[:4], batch[:4], strict=True))


@given(LENGTHS, st.integers(1, 20))
def test_balanced_groups_have_everything_once_and_nearly_equal_sums(lengths, bins):
    groups = balanced_bins(lengths, bins)
    assert len(groups) == bins
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    sums = [sum(lengths[i] for i in group) for group in groups]
    assert max(sums) - min(sums) <= max(lengths)
    assert all(groups) == (bins <= len(lengths))


@given(LENGTHS, st.integers(0, 100), COSTS)
def test_the_bins_have_every_row_once_and_cost_no_more_than_either_extreme(lengths, shared, cost):
    bins = cheapest_bins(lengths, shared, cost)
    assert sorted(i for one in bins for i in one) == list(range(len(lengths)))
    assert all(bins)

    def price(division):
        longest = max(sum(lengths[i] for i in one) for one in division)
        return cost.of(len(division), shared + longest)

    assert price(bins) <= price([list(range(len(lengths)))])
    assert bins == cheapest_bins(lengths, shared, cost)


def test_what_is_dear_decides():
    lengths = [10] * 8
    assert len(cheapest_bins(lengths, 100, Cost(token=1.0, pair=0.0))) == 1
    assert len(cheapest_bins(lengths, 0, Cost(token=0.0, pair=1.0))) == 8
