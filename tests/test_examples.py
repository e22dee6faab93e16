"""The experiments of examples/real-tasks and examples/commonsense: tasks, folds, and all stages."""

import importlib.util
import json
import shutil
import sys
from itertools import chain
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from loragen.cli.main import app
from loragen.core.config import GenTrainConfig, LoraTrainConfig, load
from tests.conftest import ANIMALS, COLORS, TINY_GENERATOR, TINY_LORA, rows_of, write_lines

EXAMPLES = Path(__file__).parent.parent / "examples"
EXAMPLE = EXAMPLES / "real-tasks"


def module_of(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # a dataclass looks its module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def generator():
    return module_of("make_tasks")


@pytest.fixture(scope="module")
def run():
    return module_of("run")


@pytest.fixture(scope="module")
def written(generator, tmp_path_factory):
    """The directory of the tasks, and {task: {split: rows}}."""
    output = tmp_path_factory.mktemp("tasks")
    tasks = generator.write_tasks(output)

    def rows(name, split):
        file = output / name / f"{name}_{split}_formatted.jsonl"
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]

    splits = ("train", "test", "unseen")
    return output, {
        task.name: {split: rows(task.name, split) for split in splits} for task in tasks
    }


def lines_of(splits, split, line):
    """The wordings (line 0) or the inputs (line 1) of all tasks together."""
    return {row["prompt"].split("\n")[line] for one in splits.values() for row in one[split]}


class TestTasks:
    def test_the_files_are_the_same_every_time(self, generator, written, tmp_path):
        generator.write_tasks(tmp_path)
        for file in sorted(path for path in written[0].rglob("*") if path.is_file()):
            assert (tmp_path / file.relative_to(written[0])).read_bytes() == file.read_bytes()

    def test_there_are_about_thirty_in_the_families_of_the_protocol(self, run, written):
        output, tasks = written
        families, design = run.families_of(output), run.Design.of(EXAMPLE, quick=False)
        assert 28 <= len(tasks) <= 32
        assert families.keys() == tasks.keys()
        assert set(design.far) <= set(families.values())

    def test_each_has_rows_enough_and_none_twice(self, run, written):
        prompts_read = run.Design.of(EXAMPLE, quick=False).prompts
        for name, splits in written[1].items():
            assert 60 <= len(splits["train"]) <= 300, name
            assert prompts_read < len(splits["unseen"]) <= 100, name
            for rows in splits.values():
                prompts = [row["prompt"] for row in rows]
                assert len(set(prompts)) == len(prompts), name

    def test_no_tested_input_is_in_a_training_row_of_any_task(self, written):
        tested = lines_of(written[1], "test", 1) | lines_of(written[1], "unseen", 1)
        assert not lines_of(written[1], "train", 1) & tested

    def test_unseen_wordings_are_in_no_training_row_of_any_task(self, written):
        assert not lines_of(written[1], "train", 0) & lines_of(written[1], "unseen", 0)
        for name, splits in written[1].items():
            wordings = [len(lines_of({name: splits}, split, 0)) for split in splits]
            assert wordings == [6, 6, 3], name

    def test_relatives_share_wordings_in_part(self, written):
        three, five = ({row["prompt"].split("\n")[0] for row in written[1][name]["train"]}
                       for name in ("animal-among-3", "animal-among-5"))  # fmt: skip
        assert 2 <= len(three & five) <= 6

    def test_no_prompt_has_two_answers(self, written):
        answers = {}
        for splits in written[1].values():
            for row in chain(*splits.values()):
                assert answers.setdefault(row["prompt"], row["response"]) == row["response"], row

    def test_one_word_of_a_list_is_of_the_kind_asked_for(self, generator, written):
        for name, splits in written[1].items():
            kind, _, size = name.partition("-among-")
            for row in chain(*splits.values()) if size else ():
                words = row["prompt"].split("\n")[1].split(", ")
                assert len(words) == int(size)
                found = [word for word in words if word in generator.KINDS[kind]]
                assert found == [row["response"]], row

    def test_a_list_is_asked_for_different_places(self, written):
        first, last = ({row["prompt"].split("\n")[1] for row in written[1][name]["train"]}
                       for name in ("first-of-3", "last-of-3"))  # fmt: skip
        assert len(first & last) > 200

    @pytest.mark.parametrize(
        "task, text, answer",
        [
            ("plural", "city", "cities"),
            ("plural", "child", "children"),
            ("past-tense", "carry", "carried"),
            ("third-person", "go", "goes"),
            ("comparative", "big", "bigger"),
            ("number-in-words", "340", "three hundred and forty"),
            ("difference", "3 65", "62"),
            ("antonym", "cold", "hot"),
            ("capital", "Oman", "Muscat"),
            ("spell-out", "key", "k e y"),
        ],
    )
    def test_answers(self, generator, task, text, answer):
        (found,) = [one for one in generator.all_tasks() if one.name == task]
        pairs = dict(found.pairs)
        assert pairs.get(text, answer) == answer

    def test_a_word_with_two_answers_is_refused(self, generator):
        with pytest.raises(ValueError, match=r"demo.*two answers"):
            generator.task("demo", "demo", [("up", "down"), ("up", "in")], ["?"], ["??"])


FAMILIES = {f"{family}-{i}": family for family in ("kind", "place", "sums") for i in range(7)}


class TestFolds:
    def test_near_folds_hold_every_task_out_once_and_spread_families(self, run):
        folds = run.near_folds(FAMILIES, 5)
        assert sorted(chain(*(fold.held_out for fold in folds))) == sorted(FAMILIES)
        for fold in folds:
            assert sorted([*fold.training, *fold.held_out]) == sorted(FAMILIES)
            assert not set(fold.training) & set(fold.held_out)
            for family in ("kind", "place", "sums"):
                assert any(FAMILIES[name] == family for name in fold.training)
                assert sum(FAMILIES[name] == family for name in fold.held_out) <= 2

    def test_a_far_fold_holds_a_whole_family_out(self, run):
        kind, place = run.far_folds(FAMILIES, ["kind", "place", "letters"])
        assert {FAMILIES[name] for name in kind.held_out} == {"kind"}
        assert len(kind.held_out) == len(place.held_out) == 7
        assert "kind" not in {FAMILIES[name] for name in kind.training}
        (sums,) = run.far_folds(FAMILIES, ["sums"])
        assert sums.name == "far-sums"
        with pytest.raises(SystemExit, match=r"sum: .*kind, place, sums"):
            run.far_folds(FAMILIES, ["sum"], strict=True)

    def test_every_task_is_held_out_alone_without_a_number_of_folds(self, run):
        folds = run.near_folds(FAMILIES, None)
        assert [fold.held_out for fold in folds] == [[name] for name in run.in_order(FAMILIES)]
        assert {fold.protocol for fold in folds} == {"leave-one-out"}
        assert all(len(fold.training) == len(FAMILIES) - 1 for fold in folds)

    def test_datasets_without_families_are_families_of_their_own(self, run, tmp_path):
        for name in ("boolq", "piqa"):
            write_lines(tmp_path / name / f"{name}_train_formatted.jsonl", rows_of(ANIMALS))
        assert run.families_of(tmp_path) == {"boolq": "boolq", "piqa": "piqa"}
        with pytest.raises(SystemExit, match="no tasks"):
            run.families_of(tmp_path / "boolq" / "none")

    def test_quick_keeps_the_largest_families(self, run):
        more = FAMILIES | {"kind-7": "kind", "kind-8": "kind"}
        chosen = run.largest_families(more, 16)
        assert len(chosen) == 16
        assert sum(family == "kind" for family in chosen.values()) == 9


class TestExperiment:
    @pytest.fixture
    def tasks(self, tmp_path):
        root = tmp_path / "tasks"
        words_of = {"cats": ANIMALS, "dogs": ANIMALS[::-1], "reds": COLORS, "blues": COLORS[::-1]}
        for name, words in words_of.items():
            rows = rows_of(words, count=16)
            write_lines(root / name / f"{name}_train_formatted.jsonl", rows[:10])
            write_lines(root / name / f"{name}_unseen_formatted.jsonl", rows[10:])
        families = {"cats": "animals", "dogs": "animals", "reds": "colors", "blues": "colors"}
        text = json.dumps({name: {"family": family} for name, family in families.items()})
        (root / "tasks.json").write_text(text, encoding="utf-8")
        return root

    @pytest.fixture
    def experiment(self, run, tasks, base_dir, sbert_dir, tmp_path, monkeypatch):
        """`experiment(*arguments)` runs all stages in this process, one after the other because
        models cannot be loaded in two threads at once; `experiment.commands` are the commands that
        ran."""
        commands = []

        def in_this_process(self, name, command):
            commands.append(command[3:5])
            result = CliRunner().invoke(app, command[3:])
            assert result.exit_code == 0, result.output
            self.seconds[name] = 1.0
            return result.stdout

        monkeypatch.setattr(run.Experiment, "run", in_this_process)
        monkeypatch.setattr(run, "CURVE_COLUMNS", ("base", "labels_5", "generated", "oracle"))
        lora, generator = {}, {"encoder.model": str(sbert_dir)}
        for nested, flat in ((lora, TINY_LORA), (generator, generator | TINY_GENERATOR)):
            nested.clear()
            for key, value in flat.items():
                section, _, name = key.partition(".")
                if name:
                    nested.setdefault(section, {})[name] = value
                else:
                    nested[section] = value
        design = {"split": "unseen", "prompts_from": "tested", "rows": 4, "draws": 2, "prompts": 3}
        design |= {"multi_task_steps": 6, "recovered": {"near": 0.8}}
        design |= {"folds": 4, "curve_tasks": 1, "quick": {"most_folds": 1}}
        example = tmp_path / "example"
        example.mkdir()

        def start(*arguments, quick=True, **changes):
            documents = {"lora": lora, "generator": generator, "experiment": design | changes}
            for name, document in documents.items():
                text = yaml.safe_dump(document)
                (example / f"{name}.yaml").write_text(text, encoding="utf-8")
            given = ["--tasks", tasks, "--model", base_dir, "--output", tmp_path / "out"]
            given += ["--example", example, *(["--quick"] if quick else []), "--jobs", "1"]
            run.main([str(one) for one in (*given, *arguments)])
            return tmp_path / "out"

        start.commands = commands
        return start

    def test_all_stages_end_in_a_table(self, run, experiment):
        out = experiment()
        collect, train, evaluate = ["lora", "train"], ["gen", "train"], ["gen", "eval"]
        assert experiment.commands == [collect, train, evaluate, evaluate]
        document = json.loads((out / "results.json").read_text(encoding="utf-8"))
        near = document["protocols"]["near"]
        ((fold, held_out),) = document["folds"].items()
        (tested,) = near["datasets"]
        assert (fold, held_out) == ("near-0", [tested["name"]])
        assert set(near["columns"]) == set(run.COLUMNS)
        assert (tested["rows"], tested["prompts_from"]) == (4, "tested rows")
        text = (out / "results.md").read_text(encoding="utf-8")
        assert "near: 1 held-out task\n" in text
        assert "generated beats ridge" in text
        assert "labelled rows" in text
        assert "all trainings of multi task took" in text
        assert (out / "results.png").stat().st_size > 1000
        # The adapter of a held-out task is its oracle: it is not trained again.
        assert len(list((out / "runs").iterdir())) == 4
        kept = {path.name.rpartition("_lora_")[0] for path in (out / "cache" / "runs").iterdir()}
        assert kept == {"multi-task", f"{tested['name']}-5-labels"}

        experiment.commands.clear()
        (out / "results.md").unlink()
        experiment()
        assert experiment.commands == []  # everything was there
        assert (out / "results.md").read_text(encoding="utf-8") == text
        with pytest.raises(SystemExit, match=r"other settings.*seed"):
            experiment("--seed", "1")

    def test_every_dataset_is_held_out_alone(self, experiment, tasks):
        """The experiment of examples/commonsense, without families, label curve and targets."""
        (tasks / "tasks.json").unlink()
        shutil.rmtree(tasks / "reds")
        changes = {"folds": None, "curve_tasks": 0, "recovered": {}}
        out = experiment(quick=False, **changes)
        train, evaluate = ["gen", "train"], ["gen", "eval"]
        assert experiment.commands[1:] == [train, evaluate] * 3
        document = json.loads((out / "results.json").read_text(encoding="utf-8"))
        names = ["blues", "cats", "dogs"]
        assert document["folds"] == {f"leave-one-out-{name}": [name] for name in names}
        results = document["protocols"]["leave-one-out"]
        assert sorted(one["name"] for one in results["datasets"]) == names
        text = (out / "results.md").read_text(encoding="utf-8")
        assert "leave-one-out: 3 held-out tasks" in text
        assert "| format validity |" in text
        assert "generated is beaten by: " in text
        assert "met**" not in text

    def test_another_example_needs_tasks(self, run, tmp_path):
        with pytest.raises(SystemExit, match="--tasks is missing"):
            run.main(["--example", str(tmp_path), "--output", str(tmp_path / "out")])

    def test_targets_are_those_of_the_protocol(self, run):
        headroom = {"columns": {"generated": {"mean": 0.5}}}
        of = {
            "beats": ["nearest", "ridge", "arrow", "few_shot"],
            "beaten_by": [],
            "headroom": headroom,
            "margins": {"other_prompts": {"positive": 0.9}},
        }
        near, far = (dict(run.targets(*one)) for one in (("near", of, 0.80), ("far", of, 0.35)))
        assert [what for what, met in near.items() if not met] == [
            "generated beats multi task",
            "generated recovers 0.80 of the headroom (0.50)",
        ]
        assert all(far.values())
        assert len(far) == 7


@pytest.mark.parametrize("example", ["real-tasks", "commonsense"])
def test_the_configurations_are_understood(run, example):
    lora = load(LoraTrainConfig, EXAMPLES / example / "lora.yaml", environment={})
    assert lora.lora.freeze_a
    assert lora.checkpoints.first_step == 1 + lora.schedule.options["stage1_steps"]
    generator = load(GenTrainConfig, EXAMPLES / example / "generator.yaml", environment={})
    assert generator.loggers == {}
    design, quick = (run.Design.of(EXAMPLES / example, quick) for quick in (False, True))
    assert (design.most_folds, quick.most_folds) == (None, 1)
    assert quick.multi_task_steps < design.multi_task_steps <= 200
