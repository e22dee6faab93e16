import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loragen.core.data.dataset import Prompt
from loragen.core.data.prepare import RECORD, TRAIN, VAL, Grouping, prepare, read_prepared, split
from loragen.core.data.prompts import joined, read_prompts
from loragen.core.errors import DataError, UsageError

texts = st.lists(st.text("ab \n", min_size=1).filter(str.strip), max_size=40)
groupings = st.builds(
    Grouping,
    samples_per_prompt=st.integers(1, 5),
    test_ratio=st.floats(0, 0.99),
    seed=st.integers(0, 9),
)


def numbered(texts):
    return [Prompt(line, text) for line, text in enumerate(texts, start=1)]


def same(prompt):
    return " ".join(prompt.text.split())


@pytest.fixture
def file(dataset):
    """`file(name, count)`: a dataset of rows that are all different."""

    def write(name="colors", count=40):
        rows = [{"prompt": f"{name} {i}?", "response": "red"} for i in range(count)]
        return dataset(rows, f"{name}.jsonl")

    return write


class TestSplit:
    @given(texts, groupings)
    def test_no_row_is_in_two_texts_and_no_text_on_both_sides(self, texts, grouping):
        found = split(numbered(texts), "x", grouping, {})
        groups = [*found.train, *found.val]
        assert {len(group) for group in groups} <= {grouping.samples_per_prompt}
        drawn = [prompt for group in groups for prompt in group]
        assert set(Counter(prompt.line for prompt in drawn).values()) <= {1}
        assert set(Counter(map(same, drawn)).values()) <= {1}
        assert len(drawn) + found.left_over + found.repeated == len(texts)
        assert found.left_over < grouping.samples_per_prompt
        assert found == split(numbered(texts), "x", grouping, {})

    @given(texts, texts, groupings)
    def test_what_two_datasets_have_is_on_one_side_in_both(self, one, other, grouping):
        sides = {}
        found = [split(numbered(t), n, grouping, sides) for t, n in ((one, "x"), (other, "y"))]
        train, val = (
            {same(prompt) for split in found for group in getattr(split, side) for prompt in group}
            for side in ("train", "val")
        )
        assert not train & val

    @pytest.mark.parametrize(
        "count, ratio, train, val",
        [(40, 0.1, 9, 1), (40, 0.25, 8, 2), (40, 0.0, 10, 0), (40, 0.01, 9, 1), (8, 0.9, 1, 1),
         (4, 0.5, 1, 0), (1000, 0.1, 225, 25)],
    )  # fmt: skip
    def test_the_ratio_counts_texts_and_one_is_left_to_learn_from(self, count, ratio, train, val):
        grouping = Grouping(samples_per_prompt=4, test_ratio=ratio)
        found = split(numbered(map(str, range(count))), "x", grouping, {})
        assert (len(found.train), len(found.val)) == (train, val)

    def test_the_seed_decides(self):
        prompts = numbered(map(str, range(40)))
        one, other = (split(prompts, "x", Grouping(seed=seed), {}) for seed in (1, 2))
        assert one != other


class TestPrepare:
    def test_a_line_has_the_text_its_prompts_and_where_they_are_from(self, file, tmp_path):
        source = file()
        prepare([("colors", source)], tmp_path / "p", Grouping())
        rows = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
        for name in (TRAIN, VAL):
            for line in (tmp_path / "p" / name).read_text(encoding="utf-8").splitlines():
                text = json.loads(line)
                prompts = [rows[number - 1]["prompt"] for number in text["lines"]]
                assert text == {
                    "prompt": "\n\n".join(prompts),
                    "prompts": prompts,
                    "dataset": "colors",
                    "lines": text["lines"],
                }

    def test_the_record_says_how_and_of_what(self, file, tmp_path):
        source = file(count=41)
        with source.open("a", encoding="utf-8") as stream:
            stream.write('{"prompt": "colors  7?", "response": "blue"}\nno row\n')
        with pytest.raises(DataError, match=r"43: not JSON.*--skip-bad-rows leaves it out"):
            prepare([("colors", source)], tmp_path / "p", Grouping())
        assert not (tmp_path / "p").exists()
        record = prepare([("colors", source)], tmp_path / "p", Grouping(), skip_bad_rows=True)
        (dataset,) = record.datasets
        assert (dataset.prompts, dataset.bad_rows, dataset.repeated) == (42, 1, 1)
        assert (dataset.left_over, dataset.train, dataset.val) == (1, 9, 1)
        assert read_prepared(tmp_path / "p").record == record

    def test_the_same_again_is_the_same_bytes(self, file, tmp_path):
        sources = [("colors", file("colors")), ("animals", file("animals"))]
        for name in ("one", "two"):
            prepare(sources, tmp_path / name, Grouping())
        for name in (TRAIN, VAL, RECORD):
            assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()

    def test_nothing_is_overwritten_unasked_and_other_files_are_left_alone(self, file, tmp_path):
        home = tmp_path / "p"
        home.mkdir()
        (home / "notes.txt").write_text("mine", encoding="utf-8")
        prepare([("colors", file())], home, Grouping())
        before = (home / TRAIN).read_bytes()
        with pytest.raises(UsageError, match=r"has prepared\.json, train_prompts.* --force"):
            prepare([("colors", file())], home, Grouping(seed=1))
        assert (home / TRAIN).read_bytes() == before
        prepare([("colors", file())], home, Grouping(seed=1), force=True)
        assert (home / TRAIN).read_bytes() != before
        assert (home / "notes.txt").read_text(encoding="utf-8") == "mine"

    def test_what_cannot_be_prepared(self, file, tmp_path):
        few = file("few", 3)
        with pytest.raises(DataError, match="3 different prompts are too few for a text of 4"):
            prepare([("few", few)], tmp_path / "p", Grouping())
        with pytest.raises(UsageError, match="two sources are called few"):
            prepare([("few", few), ("few", few)], tmp_path / "p", Grouping())
        with pytest.raises(UsageError, match="is a file; --output is a directory"):
            prepare([("few", few)], few, Grouping())
        assert not (tmp_path / "p").exists()


class TestRead:
    def test_datasets_are_told_apart(self, file, tmp_path):
        sources = [("colors", file("colors")), ("animals", file("animals"))]
        prepare(sources, tmp_path / "p", Grouping())
        found = read_prepared(tmp_path / "p")
        for name, _ in sources:
            groups = found.of(name)
            assert (len(groups.train), len(groups.val)) == (9, 1)
            assert all(p.startswith(name) for g in (*groups.train, *groups.val) for p in g)
        with pytest.raises(UsageError, match=r"no prompts of the dataset 'color' in it\. Did you"):
            found.of("color")

    def test_other_commands_read_the_prompts_one_by_one(self, file, tmp_path):
        """A generator joins its prompts itself: what was joined must not be joined again."""
        prepare([("colors", file())], tmp_path / "p", Grouping())
        groups = read_prepared(tmp_path / "p").of("colors").train
        prompts = read_prompts(tmp_path / "p" / TRAIN)
        assert prompts == [prompt for group in groups for prompt in group]
        assert joined(prompts, 4) == ["\n\n".join(group) for group in groups]

    def test_a_directory_that_is_none(self, file, tmp_path):
        with pytest.raises(UsageError, match="no such directory of prompts"):
            read_prepared(tmp_path / "none")
        with pytest.raises(UsageError, match=r"data prepare` has not made it \(no prepared.json\)"):
            read_prepared(tmp_path)
        prepare([("colors", file())], tmp_path / "p", Grouping())
        with (tmp_path / "p" / VAL).open("a", encoding="utf-8") as stream:
            stream.write('{"prompt": "x"}\n')
        with pytest.raises(DataError, match=r"val_prompts\.jsonl:2: not a line of `loragen data"):
            read_prepared(tmp_path / "p")
        (tmp_path / "p" / RECORD).write_text("{}", encoding="utf-8")
        with pytest.raises(DataError, match=r"prepared\.json: not the record of prepared prompts"):
            read_prepared(tmp_path / "p")
