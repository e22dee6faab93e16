import logging

import pytest

from loragen.core.data.dataset import Dataset
from loragen.core.data.prompts import Grouping, prepare
from loragen.core.errors import UsageError
from loragen.core.learning.sources import check_places
from loragen.core.run.directory import LoraManifest, read_manifest


@pytest.fixture
def check(gen_config, collection):
    """`check(prompts)`: of a run whose prompts are elsewhere."""
    run = str(collection.runs["colors"])
    return lambda prompts: check_places(gen_config({"sources": [{"run": run, "prompts": prompts}]}))


TEST = {"max_steps": 6, "steps": [4, 5, 6]}
OLD, NEW = {"started": "2025-01-01T00:00:00+00:00"}, {"started": "2025-02-01T00:00:00+00:00"}


class TestFolders:
    def test_what_is_named_is_not_told_to_be_left_out(self, runs, gen_config, caplog):
        folder, run = str(runs.folder), runs("a", status="failed")
        check_places(gen_config({"sources": [], "data.checkpoint_dir": [folder, str(run)]}))
        assert caplog.messages == [f"{run}: not finished; the checkpoints there are taken"]

    def test_one_line_tells_of_each_kind_left_out(self, runs, gen_config, caplog):
        for name, changes in {
            "a": NEW,
            **{f"b{i}": OLD for i in range(7)},
            "c": TEST,
            "d": {"status": "failed"},
            "e": {"status": "running"},
        }.items():
            runs(name, **changes)
        with caplog.at_level(logging.INFO, "loragen"):
            check_places(gen_config({"sources": [], "data.checkpoint_dir": str(runs.folder)}))
        unfinished, tests, superseded = caplog.messages
        assert unfinished.startswith(f"{runs.folder / 'd'}, {runs.folder / 'e'}: left out, not fin")
        assert tests == f"{runs.folder / 'c'}: left out, trained with --test-mode"
        assert "b4 and 2 more: left out, since another run of a dataset of this n" in superseded
        assert [record.levelname for record in caplog.records] == ["WARNING", "INFO", "INFO"]

    def test_an_unfinished_run_that_is_named_is_taken_with_a_warning(
        self, runs, gen_config, caplog
    ):
        run = runs("a", status="interrupted")
        check_places(gen_config({"sources": [{"run": str(run)}]}))
        assert caplog.messages == [f"{run}: not finished; the checkpoints there are taken"]


def test_prompts_may_be_on_the_hub(check):
    check("hub:openai/gsm8k:main")


@pytest.mark.parametrize(
    "prompts, message",
    [("none.txt", "none.txt: no such prompt file"), ("hub:gsm8k", "hub:gsm8k: expected hub:owner")],
)
def test_prompts_that_cannot_be_are_refused(check, prompts, message):
    ((keys, problem),) = check(prompts)
    assert keys == ("sources", 0, "prompts")
    assert problem.startswith(message)


class TestPrepared:
    @pytest.fixture
    def prompts(self, collection, tmp_path):
        """A directory of both datasets' prompts, two to a text."""
        sources = [Dataset(collection.file(name), name) for name in collection.names]
        prepare(sources, tmp_path / "prompts", Grouping(samples_per_prompt=2))
        return tmp_path / "prompts"

    def test_it_is_looked_at_before_anything_heavy(self, prompts, gen_config, check):
        check_places(gen_config({"data.prompts": str(prompts)}))
        check(str(prompts))

    def test_texts_of_another_size_are_refused(self, prompts, gen_config):
        config = {"data.prompts": str(prompts), "data.samples_per_prompt": 4}
        with pytest.raises(UsageError, match=r"with 2 samples per prompt: set data\.samples_"):
            check_places(gen_config(config))

    def test_every_dataset_must_be_there(self, collection, tmp_path, gen_config, check):
        source = Dataset(collection.file("animals"), "animals")
        prepare([source], tmp_path / "p", Grouping(samples_per_prompt=2))
        with pytest.raises(UsageError, match=r"no prompts of the dataset 'colors' in it.*animals"):
            check_places(gen_config({"data.prompts": str(tmp_path / "p")}))
        check(str(tmp_path / "p"))  # named for a run, whatever it is called

    def test_two_datasets_of_one_name_need_prompts_of_their_own(self, runs, prompts, gen_config):
        data = read_manifest(runs("a"), LoraManifest).dataset
        other = data.model_copy(update={"path": "/other/colors.jsonl", "sha256": "other"})
        sources = [{"run": str(runs.folder / "a")}, {"run": str(runs("b", dataset=other))}]
        config = {"data.prompts": str(prompts), "sources": sources}
        with pytest.raises(UsageError, match=r"called colors: .*data\.prompts cannot tell them"):
            check_places(gen_config(config))
        sources[1]["prompts"] = str(prompts)
        check_places(gen_config(config))

    def test_a_directory_that_is_not_prepared(self, tmp_path, gen_config, check):
        with pytest.raises(UsageError, match=r"no prepared\.json"):
            check(str(tmp_path))
        ((keys, problem),) = check_places(gen_config({"data.prompts": "none"}))
        assert keys == ("data", "prompts")
        assert problem.startswith("none: no such directory of prompts")
