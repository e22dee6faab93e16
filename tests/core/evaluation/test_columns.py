import pytest

from loragen.core.errors import UsageError
from loragen.core.evaluation.contestants import COLUMNS, chosen, contestant_class, titles


def names(columns):
    return [column.name for column in columns]


def test_by_default_all_that_need_no_training():
    assert names(chosen([])) == [
        "base", "mean_adapter", "nearest_adapter", "few_shot", "random_prompts", "generated",
    ]  # fmt: skip


def test_named_ones_come_in_the_order_of_the_table_with_those_on_demand():
    assert names(chosen(["generated", " base"], ["oracle"])) == ["base", "generated", "oracle"]
    assert names(chosen(["multi-task"])) == ["multi_task"]


def test_an_unknown_one_is_refused():
    with pytest.raises(UsageError, match=r"'oracel'\. Did you mean 'oracle'\? There are: base"):
        chosen(["oracel"])


@pytest.mark.parametrize("column", COLUMNS, ids=lambda column: column.name)
def test_every_column_has_a_class_that_competes(column):
    assert contestant_class(column).entries


def test_the_number_of_shots_is_above_its_column():
    assert titles(7)["few_shot"] == "7-shot"
