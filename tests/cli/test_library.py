"""Libraries of adapters: in a folder and on the hub, and what a generator learns from one."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module

import pytest

from loragen.core.adapter.files import read_adapter
from loragen.core.data.dataset import Dataset
from loragen.core.errors import WriteError
from loragen.core.hub import PLACE
from loragen.core.learning.library import changes
from loragen.core.learning.library.changes import AddOptions, add_adapters
from loragen.core.learning.library.records import AdapterLibrary
from loragen.testing.adapters import peft_adapter

HASHING = ("--encoder", "hashing", "--encoder-options", '{"dim": 64}')
OPTIONS = AddOptions(encoder="hashing", encoder_options={"dim": 64})


@pytest.fixture
def team(loragen, collection):
    """A library of the two runs of the collection, in the working directory."""
    result = loragen("library", "add", "team", *collection.runs.values(), *HASHING)
    assert result.exit_code == 0, result.output
    assert result.stdout == "team/animals\nteam/colors\n"
    return loragen.work / "team"


@pytest.fixture
def listed(loragen):
    """The names of a library's adapters, in their order, with their records."""

    def read(place="team", *more):
        result = loragen("library", "list", place, *more, "--json")
        assert result.exit_code == 0, result.output
        return {one["name"]: one for one in json.loads(result.stdout)["adapters"]}

    return read


def contents(directory):
    """{path below the directory: bytes} of all files."""
    files = (path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in files}


def equal(one, other):
    ours, theirs = read_adapter(one).tensors, read_adapter(other).tensors
    return ours.keys() == theirs.keys() and all(ours[key].equal(theirs[key]) for key in ours)


class TestAdding:
    def test_an_adapter_has_its_prompts_its_card_and_a_record(self, team, collection, listed):
        for name, run in collection.runs.items():
            assert equal(team / name, run / "adapter")
            rows = Dataset(collection.file(name)).rows()
            assert Dataset(team / name / "prompts.jsonl").rows() == rows
            card = (team / name / "README.md").read_text(encoding="utf-8")
            assert f'PeftModel.from_pretrained(base, "{PLACE}")' in card
        found = listed()
        assert list(found) == ["animals", "colors"]
        record = found["colors"]
        assert (record["prompts"], record["answers"], record["rank"]) == (16, True, 2)
        assert record["base_model"] == str(collection.base)
        assert record["lineage"]["dataset"] == "colors"
        assert len(record["centre"]) == 64

    def test_a_folder_of_runs(self, loragen, collection, tmp_path):
        runs = shutil.copytree(collection.runs["colors"].parent, tmp_path / "runs")
        older = shutil.copytree(runs / collection.runs["colors"].name, runs / "older")
        manifest = json.loads((older / "manifest.json").read_text(encoding="utf-8"))
        manifest["started"] = "2020-01-01T00:00:00+00:00"
        (older / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
        result = loragen("library", "add", "team", runs, *HASHING)
        assert sorted(result.stdout.split()) == ["team/animals", "team/colors"], result.output
        assert result.stderr.endswith("--test-mode: older\n")

    def test_every_kind_of_row_is_read_back_as_it_was(self, loragen, tmp_path):
        rows = [
            {"prompt": "a", "response": ["b", "c"], "system": "s", "history": [["d", "e"]]},
            {"question": "q", "choices": ["x", "y"], "answer": 1},
            {"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "1"}]},
            {"prompt": "line\u2028break", "response": 7, "choices": ["7", "8"]},
        ]
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        adapter = peft_adapter(tmp_path / "mine")
        given = ("--prompts", file, "--name", "all", *HASHING)
        assert loragen("library", "add", "team", adapter, *given).exit_code == 0
        assert Dataset(loragen.work / "team/all/prompts.jsonl").rows() == Dataset(file).rows()

    def test_again_it_changes_nothing(self, loragen, team, collection):
        before = contents(team)
        result = loragen("library", "add", "team", collection.runs["colors"])
        assert (result.exit_code, result.stdout) == (0, "")
        assert "colors: there already" in result.stderr
        assert contents(team) == before

    def test_prompts_alone(self, loragen, collection, listed):
        given = (collection.runs["colors"], "--prompts-only", *HASHING)
        assert loragen("library", "add", "team", *given).exit_code == 0
        assert listed()["colors"]["answers"] is False
        text = (loragen.work / "team/colors/prompts.jsonl").read_text(encoding="utf-8")
        assert json.loads(text.splitlines()[0]) == {"prompt": "Question 0 about red?"}

    def test_an_adapter_of_no_run_needs_its_prompts(self, fails, tmp_path):
        adapter = peft_adapter(tmp_path / "mine")
        assert "--prompts FILE" in fails(2, "library", "add", "team", adapter, *HASHING)
        (tmp_path / "some.txt").write_text("one\ntwo\n", encoding="utf-8")
        given = ("--prompts", tmp_path / "some.txt", *HASHING)
        result = fails.loragen("library", "add", "team", adapter, *given)
        assert (result.exit_code, result.stdout) == (0, "team/mine\n"), result.output

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            ({"r": 4}, "other: its rank: 4, not 8 (as first)"),
            ({"lora_alpha": 5}, "other: its scaling: 0.625, not 1 (as first)"),
            ({"target_modules": ["q_proj"]}, "other: its modules: self_attn.q_proj, not"),
        ],
    )
    def test_what_does_not_fit_is_not_added_and_nothing_with_it(
        self, fails, tmp_path, change, reason
    ):
        (tmp_path / "some.txt").write_text("one\ntwo\n", encoding="utf-8")
        options = {"r": 8, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
        first = peft_adapter(tmp_path / "first", **options)
        other = peft_adapter(tmp_path / "other", **{**options, **change})
        more = ("--prompts", tmp_path / "some.txt", *HASHING)
        assert fails.loragen("library", "add", "team", first, *more).exit_code == 0
        assert reason in fails(1, "library", "add", "team", other, "--prompts", more[1])

    def test_another_base_does_not_fit(self, fails, team, tmp_path):
        (tmp_path / "some.txt").write_text("one\n", encoding="utf-8")
        adapter = peft_adapter(tmp_path / "mine")
        error = fails(1, "library", "add", "team", adapter, "--prompts", tmp_path / "some.txt")
        assert "its base is" in error

    def test_a_taken_name(self, fails, team, collection, listed):
        run, other = collection.runs["colors"], collection.runs["animals"]
        assert "--force" in fails(2, "library", "add", "team", run, "--name", "animals")
        (team / "animals" / "notes.txt").write_text("mine", encoding="utf-8")
        given = ("--name", "animals", "--force")
        assert fails.loragen("library", "add", "team", run, *given).exit_code == 0
        assert equal(team / "animals", run / "adapter")
        assert not equal(team / "animals", other / "adapter")
        assert (team / "animals" / "notes.txt").read_text(encoding="utf-8") == "mine"

    def test_names_that_differ_in_case_alone_are_one(self, fails, collection, tmp_path):
        """One directory on Windows and macOS."""
        other = shutil.copytree(collection.runs["colors"], tmp_path / "other")
        manifest = json.loads((other / "manifest.json").read_text(encoding="utf-8"))
        manifest["dataset"]["name"] = "Colors"
        (other / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
        both = (collection.runs["colors"], other)
        assert "two adapters are called Colors" in fails(
            2, "library", "add", "team", *both, *HASHING
        )
        assert not (fails.loragen.work / "team").exists()

    def test_a_foreign_directory_of_the_name_stays(self, fails, team, collection):
        (team / "mine").mkdir()
        (team / "mine" / "notes.txt").write_text("mine", encoding="utf-8")
        given = ("library", "add", "team", collection.runs["colors"], "--name", "mine")
        fails(2, *given)
        fails(2, *given, "--force")

    def test_a_folder_of_something_else_is_no_library(self, fails, collection):
        (fails.loragen.work / "thesis").mkdir()
        (fails.loragen.work / "thesis" / "text.tex").write_text("x", encoding="utf-8")
        run = collection.runs["colors"]
        assert "no library" in fails(2, "library", "add", "thesis", run, *HASHING)
        assert "no library" in fails(2, "library", "list", "thesis")

    def test_the_centres_of_a_library_are_of_one_encoder(self, fails, team, collection):
        given = ("--name", "again", "--encoder", "hashing")
        error = fails(2, "library", "add", "team", collection.runs["colors"], *given)
        assert "its centres are of the encoder hashing" in error

    def test_a_dataset_that_has_changed(self, fails, collection, tmp_path, monkeypatch):
        run = shutil.copytree(collection.runs["colors"], tmp_path / "run")
        manifest = json.loads((run / "manifest.json").read_text(encoding="utf-8"))
        manifest["dataset"]["sha256"] = "0" * 64
        (run / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
        assert "has changed since the run" in fails(1, "library", "add", "team", run, *HASHING)

    def test_an_adapter_is_there_as_a_whole_or_not_at_all(self, team, collection, monkeypatch):
        run, move, moved = str(collection.runs["colors"]), shutil.move, []

        def full(*arguments):
            moved.append(arguments)
            if len(moved) == 3:
                raise OSError(28, "No space left on device")
            return move(*arguments)

        before = contents(team)
        monkeypatch.setattr(changes.shutil, "move", full)
        with pytest.raises(WriteError, match="No space left"):
            add_adapters("team", [run], AddOptions(name="more"))
        assert contents(team) == before
        assert sorted(path.name for path in team.iterdir()) == sorted(
            [".library.lock", "README.md", "animals", "colors", "library.json"]
        )

    def test_several_at_once_lose_nothing(self, team, collection):
        """Each opens the library for itself, as a process does."""
        run = str(collection.runs["colors"])

        def add(number):
            options = AddOptions(name=f"colors-{number}", encoder="hashing")
            return add_adapters("new", [run], options)

        with ThreadPoolExecutor(4) as pool:
            added = [name for change in pool.map(add, range(8)) for name in change.added]
        assert added == [f"colors-{number}" for number in range(8)]
        found = AdapterLibrary.open("new")
        assert list(found.entries) == added


class TestReading:
    def test_the_most_similar_come_first(self, team, collection, listed):
        for name in collection.names:
            found = listed("team", "--like", collection.file(name))
            assert next(iter(found)) == name
            similarity = [one["similarity"] for one in found.values()]
            assert similarity[0] == pytest.approx(1, abs=1e-4)
            assert similarity == sorted(similarity, reverse=True)

    def test_a_table(self, loragen, team, file):
        plain = loragen("library", "list", "team").stdout.splitlines()
        assert [line.split()[0] for line in plain] == ["name", "animals", "colors"]
        similar = loragen("library", "list", "team", "--like", file).stdout.splitlines()
        assert similar[0].split()[:2] == ["name", "similarity"]
        assert similar[1].split()[0] == "colors"

    def test_an_encoder_that_has_changed_is_noticed(self, fails, team, file):
        record = json.loads((team / "library.json").read_text(encoding="utf-8"))
        record["encoder"]["fingerprint"] = "other"
        (team / "library.json").write_text(json.dumps(record), encoding="utf-8")
        assert "other weights here" in fails(2, "library", "list", "team", "--like", file)

    def test_an_adapter_is_taken_out_as_plain_peft(self, loragen, team, run):
        assert loragen("library", "get", "team", "colors", "-o", "mine").stdout == "mine\n"
        assert equal(loragen.work / "mine", run / "adapter")
        assert sorted(path.name for path in (loragen.work / "mine").iterdir()) == [
            "README.md",
            "adapter_config.json",
            "adapter_model.safetensors",
        ]
        again = ("library", "get", "team", "animals", "-o", "mine")
        assert loragen(*again).exit_code == 2
        assert loragen(*again, "--force").exit_code == 0

    def test_an_unknown_name(self, fails, team):
        error = fails(2, "library", "get", "team", "color", "-o", "mine")
        assert "Did you mean 'colors'?" in error

    @pytest.mark.parametrize(
        ("text", "message"),
        [("{", "not JSON"), ("{}", "not of a library")],
    )
    def test_a_damaged_record_is_one_line(self, fails, team, text, message):
        (team / "colors" / "entry.json").write_text(text, encoding="utf-8")
        assert message in fails(1, "library", "list", "team")

    def test_a_newer_format(self, fails, team):
        record = json.loads((team / "library.json").read_text(encoding="utf-8"))
        record["format_version"] = 2
        (team / "library.json").write_text(json.dumps(record), encoding="utf-8")
        assert "upgrade loragen" in fails(1, "library", "list", "team")


class TestRemoving:
    def test_what_loragen_has_written_and_nothing_else(self, loragen, team, listed):
        (team / "colors" / "notes.txt").write_text("mine", encoding="utf-8")
        result = loragen("library", "rm", "team", "colors", "animals")
        assert result.exit_code == 0, result.output
        assert "notes.txt" in result.stderr
        assert sorted(contents(team)) == [
            ".library.lock",
            "README.md",
            "colors/notes.txt",
            "library.json",
        ]
        assert listed() == {}

    def test_a_file_that_has_changed_is_not_lost(self, fails, team):
        with (team / "colors" / "README.md").open("a", encoding="utf-8") as file:
            file.write("what I found out")
        assert "has changed" in fails(2, "library", "rm", "team", "animals", "colors")

    def test_an_unknown_name_removes_nothing(self, fails, team):
        fails(2, "library", "rm", "team", "animals", "nobody")

    def test_a_record_that_names_files_elsewhere(self, fails, team):
        file = team / "colors" / "entry.json"
        record = json.loads(file.read_text(encoding="utf-8"))
        record["files"]["../../precious"] = "0" * 64
        file.write_text(json.dumps(record), encoding="utf-8")
        assert "records no files" in fails(1, "library", "rm", "team", "colors")


class TestCopying:
    def test_chosen_ones_with_everything(self, loragen, team, listed):
        assert loragen("library", "copy", "team", "mine", "colors").stdout == "mine/colors\n"
        assert loragen("library", "copy", "team", "mine").stdout == "mine/animals\n"
        assert listed("mine")["colors"]["centre"] == listed("team")["colors"]["centre"]
        copied, original = contents(loragen.work / "mine"), contents(team)
        assert copied.keys() == original.keys()
        for path in original.keys() - {"animals/entry.json", "colors/entry.json", "README.md"}:
            assert copied[path] == original[path], path

    def test_into_a_library_of_another_encoder(self, loragen, team, run, listed):
        given = ("--name", "mine", "--encoder", "hashing", "--encoder-options", '{"dim": 32}')
        assert loragen("library", "add", "small", run, *given).exit_code == 0
        assert loragen("library", "copy", "team", "small").exit_code == 0
        found = listed("small")
        assert {len(one["centre"]) for one in found.values()} == {32}
        assert found["colors"]["centre"] == found["mine"]["centre"]

    def test_onto_itself(self, fails, team):
        assert "one library" in fails(2, "library", "copy", "team", "team/")


class TestOnTheHub:
    PLACE = "hf://me/team"

    @pytest.fixture
    def published(self, loragen, hub, team):
        result = loragen("library", "copy", "team", self.PLACE, "--private")
        assert result.exit_code == 0, result.output
        assert hub.private == {"me/team": True}
        return hub

    def test_a_list_needs_no_weights(self, loragen, published, listed, file):
        published.requests.clear()
        assert list(listed(self.PLACE, "--like", file)) == ["colors", "animals"]
        assert not [path for _, path in published.requests if path.endswith("safetensors")]

    def test_a_card_names_the_place_to_load_from(self, loragen, published, team):
        card = published.newest("me/team")["colors/README.md"].decode()
        assert 'PeftModel.from_pretrained(base, "me/team", subfolder="colors")' in card
        assert PLACE not in card
        assert loragen("library", "copy", self.PLACE, "back").exit_code == 0
        back = contents(loragen.work / "back")
        assert back["colors/README.md"] == (team / "colors" / "README.md").read_bytes()

    def test_add_get_and_remove(self, loragen, published, run, listed):
        given = ("library", "add", self.PLACE, run, "--name", "more")
        result = loragen(*given)
        assert (result.exit_code, result.stdout) == (0, f"{self.PLACE}/more\n"), result.output
        assert loragen("library", "get", self.PLACE, "more", "-o", "mine").exit_code == 0
        assert equal(loragen.work / "mine", run / "adapter")
        published.commit("me/team", {"more/notes.txt": b"mine"})
        assert loragen("library", "rm", self.PLACE, "more").exit_code == 0
        assert list(listed(self.PLACE)) == ["animals", "colors"]
        left = [path for path in published.newest("me/team") if path.startswith("more/")]
        assert left == ["more/notes.txt"]

    def test_a_commit_of_somebody_else_meanwhile(self, published, run, monkeypatch):
        newest, stale = changes.newest_commit, []

        def overtaken(*arguments):
            found = newest(*arguments)
            if not stale:
                stale.append(found)
                add_adapters(self.PLACE, [str(run)], AddOptions(name="theirs"))
            return found

        monkeypatch.setattr(changes, "newest_commit", overtaken)
        assert add_adapters(self.PLACE, [str(run)], AddOptions(name="ours")).added == ["ours"]
        names = {path.partition("/")[0] for path in published.newest("me/team") if "/" in path}
        assert names == {"animals", "colors", "ours", "theirs"}

    def test_a_taken_name_and_a_new_folder(self, fails, published, run, file):
        given = ("library", "add", self.PLACE, run, "--prompts", file, "--prompts-only")
        assert "--force" in fails(2, *given)
        place = f"{self.PLACE}/second"
        assert fails.loragen("library", "add", place, run, *HASHING).exit_code == 0
        assert "second/colors/entry.json" in published.newest("me/team")
        card = published.newest("me/team")["second/colors/README.md"].decode()
        assert 'subfolder="second/colors"' in card

    @pytest.mark.parametrize(
        ("place", "message"),
        [
            ("hf://me/nothing", "no such repository"),
            ("hf://me/other", "no library"),
            ("hf://me", "expected hf://owner/name"),
        ],
    )
    def test_what_is_no_library(self, fails, hub, place, message):
        hub.commit("me/other", {"config.json": b"{}"})
        assert message in fails(2, "library", "list", place)

    def test_a_revision_is_only_read(self, fails, published, run):
        place = f"{self.PLACE}@{next(iter(published.repositories['me/team']))}"
        assert "without @revision" in fails(2, "library", "add", place, run)

    def test_a_token_is_needed(self, fails, hub, run, monkeypatch, tmp_path):
        constants = import_module("huggingface_hub.constants")
        monkeypatch.delenv("HF_TOKEN")
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
        assert "hf auth login" in fails(2, "library", "add", self.PLACE, run, *HASHING)


class TestLearning:
    @pytest.fixture
    def train(self, loragen, gen_config, tmp_path):
        """`gen train` of the tiny generator, without its runs."""
        from loragen.core.config import dump

        def run(*arguments, **settings):
            config = gen_config({"sources": [], **settings})
            (tmp_path / "gen.yaml").write_text(dump(config), encoding="utf-8")
            result = loragen("gen", "train", "--config", tmp_path / "gen.yaml", *arguments)
            assert result.exit_code == 0, result.output
            return result

        return run

    def test_a_generator_learns_from_a_library(self, loragen, team, train):
        experiment = train("--checkpoint-dir", "team").stdout.strip()
        manifest = json.loads((loragen.work / experiment / "manifest.json").read_text("utf-8"))
        record, other = manifest["source_records"]
        assert (record["name"], other["name"]) == ("animals", "colors")
        assert record["prompts_from"] == str(team / "animals" / "prompts.jsonl")
        assert record["count"] == 1
        again = loragen("gen", "train", "--resume", experiment)
        assert (again.exit_code, "nothing is left to do" in again.stderr) == (0, True)

    def test_the_rows_serve_objectives_that_need_answers(self, team, train):
        given = ("--checkpoint-dir", "team", "--dry-run", "--set", "training.objective=behaviour")
        assert "objective: behaviour" in train(*given).stderr

    def test_what_is_named_or_held_out_is_not_used_twice(self, team, collection, train):
        runs = collection.runs["colors"].parent
        both = train("--checkpoint-dir", "team", "--checkpoint-dir", runs, "--dry-run").stderr
        assert "team/animals, team/colors: left out because another run" in both
        assert "2 datasets, 8 checkpoints" in both
        held = [{"run": str(collection.runs["colors"])}]
        one = train("--checkpoint-dir", "team", "--dry-run", val_sources=held).stderr
        assert "1 dataset, 1 checkpoint" in one

    def test_one_adapter_of_a_library(self, team, train):
        for given in (
            {"sources": [{"checkpoints": str(team / "colors")}]},
            {"data.checkpoint_dir": str(team / "colors")},
        ):
            assert "1 dataset, 1 checkpoint" in train("--dry-run", **given).stderr

    def test_a_library_on_the_hub(self, loragen, hub, team, train):
        assert loragen("library", "copy", "team", "hf://me/team").exit_code == 0
        assert "2 datasets" in train("--checkpoint-dir", "hf://me/team", "--dry-run").stderr

    def test_a_library_is_no_single_source(self, fails, team, gen_config, tmp_path):
        from loragen.core.config import dump

        config = gen_config({"sources": [{"checkpoints": str(team), "prompts": str(team)}]})
        (tmp_path / "gen.yaml").write_text(dump(config), encoding="utf-8")
        error = fails(2, "gen", "train", "--config", tmp_path / "gen.yaml", "--dry-run")
        assert "a library" in error
