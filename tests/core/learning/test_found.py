from pathlib import Path

import pytest

from loragen.core.errors import UsageError
from loragen.core.learning.sources import configured_sources, find_sources
from loragen.core.run.directory import LoraManifest, read_manifest


@pytest.fixture
def names(gen_config):
    """`names(DIR, ...)`: the runs that `data.checkpoint_dir` gives."""

    def found(*directories):
        settings = {"sources": [], "data.checkpoint_dir": [str(one) for one in directories]}
        return [Path(s.run).name for s in configured_sources(gen_config(settings))]

    return found


TEST = {"max_steps": 6, "steps": [4, 5, 6]}
OLD, NEW = {"started": "2025-01-01T00:00:00+00:00"}, {"started": "2025-02-01T00:00:00+00:00"}


class TestFolders:
    def test_of_one_dataset_the_newest_run_is_taken(self, runs, names):
        runs("a", **NEW)
        runs("b", **OLD)
        runs("c", "animals", **OLD)
        assert names(runs.folder) == ["a", "c"]

    def test_another_base_or_shape_is_another_thing(self, runs, names, collection):
        config = read_manifest(collection.runs["colors"], LoraManifest).adapter_config
        runs("a")
        runs("b", base_model="other")
        runs("c", adapter_config={**config, "r": 64})
        runs("d", adapter_config={**config, "target_modules": ["q_proj"]})
        assert names(runs.folder) == ["a", "b", "c", "d"]

    def test_a_dataset_that_moved_or_was_edited_is_the_same(self, runs, names, collection):
        data = read_manifest(collection.runs["colors"], LoraManifest).dataset
        runs("a", **OLD, dataset=data.model_copy(update={"path": "/elsewhere/colors.jsonl"}))
        runs("b", **OLD, dataset=data.model_copy(update={"sha256": "edited"}))
        runs("c", **OLD, dataset=data.model_copy(update={"path": "", "sha256": ""}))
        runs("d", **NEW)
        assert names(runs.folder) == ["d"]

    def test_two_datasets_of_one_name_are_not_taken_for_one(self, runs, names, collection):
        data = read_manifest(collection.runs["colors"], LoraManifest).dataset
        other = data.model_copy(update={"path": "/other/colors.jsonl", "sha256": "other"})
        one, two = runs("a", **OLD, dataset=other), runs("b", **NEW)
        with pytest.raises(UsageError) as raised:
            names(runs.folder)
        assert str(raised.value) == (
            f"two datasets are called colors: that of {one} (/other/colors.jsonl) and that of "
            f"{two} ({data.path}); name the runs to learn from, one or both, beside the folder"
        )
        assert names(runs.folder, one) == ["a"]
        assert names(runs.folder, one, two) == ["a", "b"]

    def test_tests_and_unfinished_runs_are_left_out(self, runs, names):
        for name, changes in {
            "a": OLD,
            "b": NEW | TEST,
            "c": NEW | {"status": "interrupted"},
            "d": NEW | {"status": "running"},
        }.items():
            runs(name, **changes)
        assert names(runs.folder) == ["a"]

    def test_what_is_named_is_taken(self, runs, names):
        runs("a", **NEW)
        for name, changes in (("b", TEST), ("c", {"status": "failed"}), ("d", OLD)):
            named = runs(name, **changes)
            assert names(named) == [name]
            assert names(runs.folder, named / "checkpoints")[0] == "checkpoints"
            assert len(names(runs.folder, named)) == 1, "the folder has another of that dataset"

    def test_what_is_held_out_is_not_learned_from(self, runs, gen_config):
        runs("a", **NEW)
        held = runs("b", "animals", **OLD)
        runs("c", "animals", **NEW)
        config = {"data.checkpoint_dir": str(runs.folder), "val_sources": [{"run": str(held)}]}
        found = find_sources(gen_config({"sources": [], **config}))
        assert [Path(one.run).name for one in found.sources] == ["a"]
        assert [place.name for place in found.superseded] == ["c"]
        with pytest.raises(UsageError, match="b is named twice"):
            find_sources(gen_config({"sources": [{"run": str(held)}], **config}))

    def test_a_folder_with_nothing_to_learn_from_is_refused(self, runs, names):
        runs("a", **TEST)
        runs("b", status="interrupted")
        with pytest.raises(UsageError, match=r"none of its 2 runs .*1 not finished, 1 of --test"):
            names(runs.folder)

    def test_a_run_named_twice_is_refused(self, runs, names):
        run = runs("a")
        with pytest.raises(UsageError, match="a is named twice"):
            names(run, run / "checkpoints")
