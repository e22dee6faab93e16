import json
import shutil
from dataclasses import replace

import pytest

from loragen.core.data.dataset import Dataset, Row
from loragen.core.data.formats import Turn
from loragen.core.errors import DataError, UsageError
from loragen.core.lora.provenance import row_hash, traced_run
from loragen.core.run.directory import LoraManifest, Run, read_manifest
from loragen.core.run.metrics import read_metrics

TRACKED = {
    "track_batches": True,
    "training.max_steps": 12,
    "schedule.stage1_steps": 6,
    "checkpoints.first_step": 5,
    "checkpoints.every": 2,
    "data.val_ratio": 0.25,
}


def trace(path):
    return traced_run(Run.open(path, LoraManifest))


def lines_of(file):
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def file(dataset):
    """Rows whose lines are not their numbers: a blank line stands between any two."""
    file = dataset()
    file.write_text(file.read_text(encoding="utf-8").replace("\n", "\n\n"), encoding="utf-8")
    return file


@pytest.fixture
def run(train_lora, file):
    return train_lora(TRACKED, file=file).directory


def test_recomputed_batches_equal_the_tracked_ones(run, file):
    tracked = lines_of(run / "tracking" / "batch_tracking_colors.jsonl")
    traced = trace(run)
    hashes = {row.line: row_hash(row) for row in Dataset(file).rows()}
    losses = {e["step"]: e["train/loss"] for e in read_metrics(run / "metrics.jsonl")
              if "train/loss" in e}  # fmt: skip
    assert [entry["step"] for entry in tracked] == list(range(1, 13))
    for entry in tracked:
        step = entry["step"]
        assert entry["lines"] == traced.provenance.lines_of(step)
        assert all(line % 2 for line in entry["lines"])
        assert entry["hashes"] == [hashes[line] for line in entry["lines"]]
        assert (entry["learning_rate"], entry["stage"]) == traced.rate(step)
        assert entry["loss"] == losses[step]
    assert [entry["stage"] for entry in tracked] == [1] * 6 + [2] * 6


def test_the_mappings_are_those_of_the_kept_checkpoints(run):
    tracked = {e["step"]: e for e in lines_of(run / "tracking" / "batch_tracking_colors.jsonl")}
    folder = run / "tracking"
    mapping = json.loads((folder / "checkpoint_mapping_colors.json").read_text(encoding="utf-8"))
    steps = [5, 7, 9, 11, 12]
    assert list(mapping) == [f"checkpoint-step-{step:03d}.ckpt" for step in steps]
    for entry, step in zip(mapping.values(), steps, strict=True):
        keys = ("step", "stage", "learning_rate", "lines")
        assert entry == {key: tracked[step][key] for key in keys}
    by_line = json.loads(
        (folder / "line_checkpoint_mapping_colors.json").read_text(encoding="utf-8")
    )
    for line, names in by_line.items():
        assert names == [n for n, entry in mapping.items() if int(line) in entry["lines"]]
    assert list(by_line) == [
        str(line) for line in sorted({n for entry in mapping.values() for n in entry["lines"]})
    ]


def test_an_early_stop_is_in_the_mapping(train_lora, dataset):
    settings = {
        **TRACKED, "training.max_steps": 40, "training.val_every": 2, "training.patience": 4,
        "schedule.learning_rate_stage1": 3e-2, "schedule.stage1_steps": 40,
        "checkpoints.first_step": 100,
    }  # fmt: skip
    run = train_lora(settings, file=dataset([{"prompt": "q", "response": f"{i * 7919}"}
                                             for i in range(8)])).directory  # fmt: skip
    (step,) = read_manifest(run, LoraManifest).steps
    assert step < 40
    text = (run / "tracking" / "checkpoint_mapping_colors.json").read_text(encoding="utf-8")
    assert [entry["step"] for entry in json.loads(text).values()] == [step]
    assert trace(run).done_steps == step


def test_a_run_without_tracking_is_traced(run, train_lora, file):
    other = train_lora({**TRACKED, "track_batches": False}, file=file).directory
    assert not (other / "tracking").exists()
    one, two = trace(run), trace(other / "checkpoints" / "checkpoint-step-005.ckpt")
    assert [one.provenance.lines_of(s) for s in range(1, 13)] == [
        two.provenance.lines_of(s) for s in range(1, 13)
    ]


def test_the_held_out_rows_and_the_others_are_all_rows(run, file):
    traced = trace(run)
    held = [row.line for row in traced.held_out]
    trained = {line for step in range(1, 13) for line in traced.provenance.lines_of(step)}
    assert sorted([*held, *trained]) == [row.line for row in Dataset(file).rows()]
    assert len(held) == 3
    assert all(traced.steps_of(line) == [] for line in held)
    assert traced.row_at(held[0]).line == held[0]
    assert traced.row_at(2) is None


def test_the_steps_of_a_line_are_those_that_have_it(run):
    traced = trace(run)
    for line in (row.line for row in traced.provenance.rows):
        wanted = [s for s in range(1, 13) if line in traced.provenance.lines_of(s)]
        assert traced.steps_of(line) == wanted


def test_a_file_that_changed_is_refused(run, file):
    file.write_text(file.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    with pytest.raises(DataError, match="changed"):
        trace(run)


def test_a_moved_file_is_found_at_the_given_path(run, file, tmp_path):
    moved = shutil.move(file, tmp_path / "moved.jsonl")
    with pytest.raises(UsageError, match="gone"):
        trace(run)
    assert traced_run(Run.open(run, LoraManifest), Dataset(moved)).done_steps == 12


def test_the_row_hash_separates_the_fields():
    row = Row(prompt="a", response="bc", line=1)
    assert row_hash(row) == row_hash(replace(row, line=9))
    others = [
        {"prompt": "ab", "response": "c"},
        {"system": "x"},
        {"response": "bd"},
        {"history": (Turn("x", "y"),)},
        {"history": (Turn("x", "z"),)},
        {"history": (Turn("x", "y"), Turn("x", "y"))},
    ]
    assert len({row_hash(replace(row, **other)) for other in [{}, *others]}) == 7
