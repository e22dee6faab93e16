import pytest

from loragen.core.errors import UsageError
from loragen.core.evaluation.targets import check_oracles, find_targets
from tests.conftest import COLORS, rows_of, write_lines


@pytest.fixture
def root(tmp_path):
    for split, count in (("train", 12), ("test", 8)):
        write_lines(tmp_path / "colors" / f"{split}.jsonl", rows_of(COLORS, count))
    return tmp_path


def test_a_name_is_tested_on_its_test_split_and_gives_prompts_of_the_other(root):
    (target,) = find_targets(["colors"], root, limit=3)
    assert (target.name, len(target.rows), len(target.prompts)) == ("colors", 3, 12)
    assert target.prompts_from == "train split"
    assert target.train.file == root / "colors" / "train.jsonl"


def test_another_split_is_tested_and_gives_its_own_prompts_on_request(root):
    write_lines(root / "colors" / "unseen.jsonl", rows_of(COLORS, 5))
    (target,) = find_targets(["colors"], root, split="unseen", prompts_from="tested rows")
    assert (target.name, len(target.rows), len(target.prompts)) == ("colors", 5, 5)
    assert target.train.file == root / "colors" / "train.jsonl"


def test_prompts_of_a_train_split_need_one(root):
    with pytest.raises(UsageError, match="no train split to take prompts from"):
        find_targets([str(root / "colors" / "test.jsonl")], root, prompts_from="train split")


def test_a_file_has_no_other_split(root):
    (target,) = find_targets([str(root / "colors" / "test.jsonl")], root)
    assert (target.prompts_from, len(target.prompts)) == ("tested rows", 8)
    with pytest.raises(UsageError, match="colors: no train split"):
        check_oracles([target])


def test_the_answers_are_those_of_the_whole_dataset_however_few_rows_are_tested(root):
    (target,) = find_targets(["colors"], root, limit=1)
    assert target.closed == sorted(COLORS)


def test_the_problems_of_all_datasets_are_reported_at_once(root):
    with pytest.raises(UsageError) as caught:
        find_targets(["colour", "nothing.jsonl"], root)
    first, second = caught.value.problems
    assert "unknown dataset 'colour'. Did you mean 'colors'?" in first
    assert second == "nothing.jsonl: no such file"


def test_two_datasets_of_one_name_are_refused(root):
    other = write_lines(root / "other" / "colors.jsonl", rows_of(COLORS))
    with pytest.raises(UsageError, match="colors: two datasets"):
        find_targets(["colors", str(other)], root)
