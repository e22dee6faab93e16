import pytest
from hypothesis import given
from hypothesis import strategies as st

from loragen.core.data.dataset import Row
from loragen.core.data.prompts import text_key
from loragen.core.errors import DataError
from loragen.core.learning.texts import (
    last_prompts,
    paired_with_dataset,
    paired_with_rows,
    split_groups,
)
from loragen.core.lora.provenance import Provenance


def trained(rows=20, batch_size=4, seed=1):
    made = [Row(prompt=f"prompt {i}", response="x", line=i + 1) for i in range(rows)]
    return Provenance(made, batch_size, seed)


def prompts_of(provenance, step):
    return [row.prompt for row in provenance.rows_of(step)]


class TestDataset:
    @given(st.integers(1, 40), st.integers(1, 5), st.floats(0, 0.99), st.integers(0, 9))
    def test_held_out_texts_share_no_prompt_with_the_others(self, count, size, ratio, seed):
        groups = split_groups([f"p{i}" for i in range(count)], size, ratio, seed)
        assert groups.train, "a source must keep texts to train on"
        train, val = ({p for group in side for p in group} for side in (groups.train, groups.val))
        assert not train & val
        texts = paired_with_dataset(groups)
        assert texts.tracked is None
        held = [texts.texts[i] for i in texts.held_out]
        assert held == ["\n\n".join(group) for group in groups.val]
        assert len(texts.texts) == len(groups.train) + len(groups.val)


class TestLastPrompts:
    def test_those_of_the_step_come_first_then_those_of_the_steps_before(self):
        run = trained(rows=40)
        assert last_prompts(run, 5, 4) == prompts_of(run, 5)
        assert last_prompts(run, 5, 3) == prompts_of(run, 5)[:3]
        assert last_prompts(run, 5, 8) == [*prompts_of(run, 5), *prompts_of(run, 4)]

    @given(
        st.integers(1, 12), st.integers(1, 9), st.integers(1, 8), st.integers(1, 30),
        st.sets(st.integers(0, 11)),
    )  # fmt: skip
    def test_they_differ_and_none_is_held_out(self, rows, batch_size, step, count, held):
        run = trained(rows, batch_size)
        excluded = {f"prompt {i}" for i in held}
        found = last_prompts(run, step, count, excluded)
        assert len(set(found)) == len(found) <= count
        past = {p for s in range(1, step + 1) for p in prompts_of(run, s)} - excluded
        assert set(found) <= past
        assert len(found) == min(count, len(past))


class TestRows:
    def paired(self, run, steps, held_out=(), size=2, most=2):
        return paired_with_rows(
            "x", run, steps, held_out, samples_per_prompt=size, most_texts=most
        )  # fmt: skip

    def test_each_checkpoint_has_the_texts_of_its_own_step(self):
        run = trained()
        texts = self.paired(run, [3, 4])
        for step, tracked in zip((3, 4), texts.tracked, strict=True):
            prompts = prompts_of(run, step)
            assert [texts.texts[i] for i in tracked] == [
                "\n\n".join(prompts[:2]),
                "\n\n".join(prompts[2:]),
            ]

    def test_a_text_that_checkpoints_share_is_embedded_once(self):
        texts = self.paired(trained(rows=40), [3, 4, 5], most=4)
        assert len(texts.texts) == len(set(texts.texts)) == 8  # of steps 2 to 5
        assert sum(map(len, texts.tracked)) == 12

    def test_too_few_rows_make_one_shorter_text(self):
        texts = self.paired(trained(rows=3, batch_size=3), [1], size=4)
        assert [len(texts.texts[i].split("\n\n")) for i in texts.tracked[0]] == [3]

    @given(st.sets(st.integers(0, 19), max_size=19), st.integers(1, 5), st.integers(1, 9))
    def test_no_row_of_a_held_out_text_is_paired(self, held, size, most):
        groups = [(f"prompt  {i}",) for i in sorted(held)]  # spaced otherwise, and the same
        texts = self.paired(trained(), [6, 7, 8], groups, size, most)
        drawn = {i for tracked in texts.tracked for i in tracked}
        assert drawn.isdisjoint(texts.held_out)
        assert len(texts.held_out) == len(groups)
        prompts = {text_key(p) for i in drawn for p in texts.texts[i].split("\n\n")}
        assert prompts.isdisjoint(f"prompt {i}" for i in held)

    def test_a_checkpoint_without_rows_is_refused(self):
        everything = [tuple(row.prompt for row in trained().rows)]
        with pytest.raises(DataError, match=r"x: no row up to step 2 is left .* data\.val_ratio"):
            self.paired(trained(), [2], everything)
