import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loragen.core.data.dataset import Dataset, Prompt
from loragen.core.data.prompts import (
    RECORD,
    TRAIN,
    VAL,
    Grouping,
    joined_texts,
    prepare,
    random_groups,
    read_prepared,
    split_prompts,
)
from loragen.core.errors import DataError, UsageError

prompts = st.lists(st.text("abc ", min_size=1), max_size=30)
sizes = st.integers(1, 7)


def written(tmp_path, name, text):
    file = tmp_path / name
    file.write_text(text, encoding="utf-8")
    return file


def test_a_text_file_has_a_prompt_a_line(tmp_path):
    file = written(tmp_path, "p.txt", "\ufefffirst\r\n\n  second  \n")
    assert Dataset(file).prompts() == ["first", "second"]


@pytest.mark.parametrize("name", ["p.jsonl", "p.json"])
def test_json_has_texts_or_objects_with_a_prompt(tmp_path, name):
    """So a file of labelled rows will do; the labels are not read."""
    documents = ["first", {"prompt": "second\nline", "response": 3, "anything": None}]
    lines = "\n".join(map(json.dumps, documents))
    text = json.dumps(documents) if name == "p.json" else lines
    assert Dataset(written(tmp_path, name, text)).prompts() == ["first", "second\nline"]


@pytest.mark.parametrize(
    "line, reason",
    [
        ("3", r"expected a text or an object with a 'prompt' \(or a row\), found int 3"),
        ('{"text": "x"}', "found keys text"),
        ('{"prompt": 3}', "'prompt': expected a text, found int 3"),
        ("{", "not JSON"),
    ],
)
def test_a_malformed_prompt_is_one_line_with_its_place(tmp_path, line, reason):
    file = written(tmp_path, "p.jsonl", f'"good"\n{line}\n')
    with pytest.raises(DataError, match=reason) as error:
        Dataset(file).prompts()
    assert str(error.value).startswith(f"{file}:2: ")


@pytest.mark.parametrize("name, text", [("p.txt", "\n \n"), ("p.jsonl", ""), ("p.json", "[]")])
def test_a_file_without_prompts_is_refused(tmp_path, name, text):
    with pytest.raises(DataError, match="no prompts in it"):
        Dataset(written(tmp_path, name, text)).prompts()


def test_a_missing_file_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match="no such prompt file"):
        Dataset(tmp_path / "none.txt").prompts()


@pytest.mark.parametrize("name", ["p.txt", "p.jsonl"])
def test_what_is_not_utf_8_is_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"\xff\xfeabc")
    with pytest.raises(DataError, match="not UTF-8 text"):
        Dataset(tmp_path / name).prompts()


def test_joined_keeps_the_order():
    assert joined_texts(["a", "b", "c"], 2) == ["a\n\nb", "c"]
    assert joined_texts(["a", "b"], 1) == ["a", "b"]
    assert joined_texts([], 3) == []


@given(prompts, sizes)
def test_joined_loses_nothing(prompts, size):
    texts = joined_texts(prompts, size)
    assert "\n\n".join(texts) == "\n\n".join(prompts)
    assert len(texts) == -(-len(prompts) // size)


@given(st.integers(0, 40), sizes, st.integers(0, 99))
def test_no_prompt_is_in_two_groups_and_every_group_is_whole(count, size, seed):
    names = [f"prompt {i}" for i in range(count)]
    groups = random_groups(names, size, seed)
    members = Counter(member for group in groups for member in group)
    assert set(members.values()) <= {1}
    assert members.keys() <= set(names)
    if count >= size:
        assert {len(group) for group in groups} == {size}
        assert count - len(members) < size
    elif count:
        assert [sorted(group) for group in groups] == [sorted(names)]
    assert groups == random_groups(names, size, seed)


def test_groups_are_drawn_at_random():
    names = [str(i) for i in range(40)]
    assert random_groups(names, 4, 1) != random_groups(names, 4, 2)
    assert random_groups(names, 4, 1)[0] != tuple(names[:4])


def test_rows_of_every_format_have_prompts(tmp_path):
    documents = [
        {"instruction": "a", "input": "b", "output": "x"},
        {"messages": [{"role": "user", "content": "c"}]},
        {"question": "d", "choices": ["x", "y"]},
    ]
    file = written(tmp_path, "p.json", json.dumps(documents))
    assert Dataset(file).prompts() == ["a\n\nb", "c", "d\nA: x\nB: y"]
    assert Dataset(written(tmp_path, "p.csv", "prompt,n\na,1\nb,2\n")).prompts() == ["a", "b"]


def test_bad_rows_are_all_reported_or_left_out(tmp_path):
    file = written(tmp_path, "p.jsonl", '"good"\n3\n{\n')
    with pytest.raises(DataError) as error:
        Dataset(file).prompts()
    assert len(error.value.problems) == 2
    assert "--skip-bad-rows" not in str(error.value)  # which no command with prompts has
    assert Dataset(file).prompts(skip_bad_rows=True, of_rows=True) == ["good"]


@pytest.mark.parametrize("name", ["p.ndjson", "p.data", "p"])
def test_only_a_txt_has_lines_of_text(tmp_path, name):
    """Any other file is read as training reads it, whatever its name."""
    row = {"prompt": "a", "response": "secret"}
    assert Dataset(written(tmp_path, name, json.dumps(row))).prompts() == ["a"]
    file = written(tmp_path, name, "a text\n")
    with pytest.raises(DataError, match=r":1: not JSON.*\.txt"):
        Dataset(file).prompts()


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
        found = split_prompts(numbered(texts), "x", grouping, {})
        groups = [*found.train, *found.val]
        assert {len(group) for group in groups} <= {grouping.samples_per_prompt}
        drawn = [prompt for group in groups for prompt in group]
        assert set(Counter(prompt.line for prompt in drawn).values()) <= {1}
        assert set(Counter(map(same, drawn)).values()) <= {1}
        assert len(drawn) + found.left_over + found.repeated == len(texts)
        assert found.left_over < grouping.samples_per_prompt
        assert found == split_prompts(numbered(texts), "x", grouping, {})

    @given(texts, texts, groupings)
    def test_what_two_datasets_have_is_on_one_side_in_both(self, one, other, grouping):
        sides = {}
        found = [
            split_prompts(numbered(t), n, grouping, sides) for t, n in ((one, "x"), (other, "y"))
        ]
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
        found = split_prompts(numbered(map(str, range(count))), "x", grouping, {})
        assert (len(found.train), len(found.val)) == (train, val)

    def test_the_seed_decides(self):
        prompts = numbered(map(str, range(40)))
        one, other = (split_prompts(prompts, "x", Grouping(seed=seed), {}) for seed in (1, 2))
        assert one != other


class TestPrepare:
    def test_a_line_has_the_text_its_prompts_and_where_they_are_from(self, file, tmp_path):
        source = file()
        prepare([Dataset(source, "colors")], tmp_path / "p", Grouping())
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
        with pytest.raises(DataError, match=r":43: not JSON.*--skip-bad-rows"):
            prepare([Dataset(source, "colors")], tmp_path / "p", Grouping())
        assert not (tmp_path / "p").exists()
        record = prepare(
            [Dataset(source, "colors")], tmp_path / "p", Grouping(), skip_bad_rows=True
        )
        (dataset,) = record.datasets
        assert (dataset.prompts, dataset.bad_rows, dataset.repeated) == (42, 1, 1)
        assert (dataset.left_over, dataset.train, dataset.val) == (1, 9, 1)
        assert read_prepared(tmp_path / "p").record == record

    def test_the_same_again_is_the_same_bytes(self, file, tmp_path):
        datasets = [Dataset(file("colors")), Dataset(file("animals"))]
        for name in ("one", "two"):
            prepare(datasets, tmp_path / name, Grouping())
        for name in (TRAIN, VAL, RECORD):
            assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()

    def test_nothing_is_overwritten_unasked_and_other_files_are_left_alone(self, file, tmp_path):
        home = tmp_path / "p"
        home.mkdir()
        (home / "notes.txt").write_text("mine", encoding="utf-8")
        prepare([Dataset(file(), "colors")], home, Grouping())
        before = (home / TRAIN).read_bytes()
        with pytest.raises(UsageError, match=r"prepared\.json.*--force"):
            prepare([Dataset(file(), "colors")], home, Grouping(seed=1))
        assert (home / TRAIN).read_bytes() == before
        prepare([Dataset(file(), "colors")], home, Grouping(seed=1), force=True)
        assert (home / TRAIN).read_bytes() != before
        assert (home / "notes.txt").read_text(encoding="utf-8") == "mine"

    def test_what_cannot_be_prepared(self, file, tmp_path):
        few = file("few", 3)
        with pytest.raises(DataError, match=r"few\.jsonl: 3 .*--samples-per-prompt"):
            prepare([Dataset(few, "few")], tmp_path / "p", Grouping())
        with pytest.raises(UsageError, match="two datasets are called few"):
            prepare([Dataset(few), Dataset(few)], tmp_path / "p", Grouping())
        with pytest.raises(UsageError, match="--output"):
            prepare([Dataset(few, "few")], few, Grouping())
        assert not (tmp_path / "p").exists()


class TestRead:
    def test_every_dataset_has_its_groups(self, file, tmp_path):
        datasets = [Dataset(file("colors")), Dataset(file("animals"))]
        prepare(datasets, tmp_path / "p", Grouping())
        found = read_prepared(tmp_path / "p")
        for dataset in datasets:
            groups = found.groups_of(dataset.name)
            assert (len(groups.train), len(groups.val)) == (9, 1)
            assert all(p.startswith(dataset.name) for g in (*groups.train, *groups.val) for p in g)
        with pytest.raises(UsageError, match=r"'color'.*'colors'"):
            found.groups_of("color")

    def test_other_commands_read_the_prompts_one_by_one(self, file, tmp_path):
        """A generator joins its prompts itself: what was joined must not be joined again."""
        prepare([Dataset(file(), "colors")], tmp_path / "p", Grouping())
        groups = read_prepared(tmp_path / "p").groups_of("colors").train
        prompts = Dataset(tmp_path / "p" / TRAIN).prompts()
        assert prompts == [prompt for group in groups for prompt in group]
        assert joined_texts(prompts, 4) == ["\n\n".join(group) for group in groups]

    def test_a_directory_that_is_none(self, file, tmp_path):
        with pytest.raises(UsageError, match="no such directory of prompts"):
            read_prepared(tmp_path / "none")
        with pytest.raises(UsageError, match=r"no prepared\.json"):
            read_prepared(tmp_path)
        prepare([Dataset(file(), "colors")], tmp_path / "p", Grouping())
        with (tmp_path / "p" / VAL).open("a", encoding="utf-8") as stream:
            stream.write('{"prompt": "x"}\n')
        with pytest.raises(DataError, match=r"val_prompts\.jsonl:2: "):
            read_prepared(tmp_path / "p")
        (tmp_path / "p" / RECORD).write_text("{}", encoding="utf-8")
        with pytest.raises(DataError, match=r"prepared\.json: "):
            read_prepared(tmp_path / "p")
