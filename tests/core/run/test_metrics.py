"""Reading what a run logs while it logs it."""

from loragen.core.run.metrics import MetricsReader
from tests.made_runs import log


def test_only_what_was_added_is_given_and_no_half_line(tmp_path):
    reader = MetricsReader(tmp_path / "metrics.jsonl")
    assert reader.new_entries() == []  # there is no file yet
    log(tmp_path, [{"step": 1, "a": 2.0}])
    assert reader.new_entries() == [{"step": 1, "a": 2.0}]
    assert reader.new_entries() == []
    with reader.file.open("a") as file:
        file.write('{"step": 2, "a": 1.')
        file.flush()
        assert reader.new_entries() == []
        file.write("5}\n")
    assert reader.new_entries() == [{"step": 2, "a": 1.5}]
    assert [entry["step"] for entry in reader.entries] == [1, 2]


def test_a_file_that_a_resumed_run_has_replaced_is_read_from_its_start(tmp_path):
    reader = MetricsReader(tmp_path / "metrics.jsonl")
    log(tmp_path, [{"step": step, "a": 1.0} for step in (1, 2, 3)])
    reader.new_entries()
    (tmp_path / "new").mkdir()
    log(tmp_path / "new", [{"step": step, "a": 9.0} for step in (1, 2, 3, 4)])
    (tmp_path / "new" / "metrics.jsonl").replace(reader.file)
    assert [entry["step"] for entry in reader.new_entries()] == [1, 2, 3, 4]
    assert [entry["a"] for entry in reader.entries] == [9.0] * 4
    reader.file.write_text("")
    assert (reader.new_entries(), reader.entries) == ([], [])
