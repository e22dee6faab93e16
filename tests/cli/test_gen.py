"""`loragen gen`."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from loragen.core.adapter.files import read_adapter
from loragen.core.config import GenTrainConfig
from loragen.core.run.directory import GENERATOR_FILE, GeneratorManifest, read_manifest

PROMPT = ("--prompt", "Question 1 about red?")


def files(directory):
    return {p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file()}


@pytest.fixture
def config_file(gen_config, loragen):
    """`c.yaml` in the working directory: the tiny generator on the tiny collection."""
    from loragen.core.config import dump

    settings = {"experiments_dir": "experiments", "data.cache_dir": "cache"}
    (loragen.work / "c.yaml").write_text(dump(gen_config(settings)), encoding="utf-8")
    return "c.yaml"


@pytest.fixture
def hub(monkeypatch):
    """The hub dataset `owner/colors`, without the hub."""
    rows = [{"question": f"Question {i} about red?", "answer": "red"} for i in range(8)]
    monkeypatch.setattr("loragen.core.data.documents.read_hub", lambda *_: rows)


@pytest.fixture
def arguments(experiment, collection):
    """On both training datasets; a name below a root is tested on its test split."""
    files = [part for name in collection.names for part in ("--dataset", collection.file(name))]
    return ("gen", "eval", "--model", experiment, *files, "--draws", 2, "--limit", 4)


class TestTrain:
    def test_a_dry_run_checks_everything_and_touches_nothing(self, loragen, config_file):
        result = loragen("gen", "train", "--config", config_file, "--dry-run")
        assert result.exit_code == 0, result.output
        config = GenTrainConfig.model_validate(yaml.safe_load(result.stdout))
        assert config.layout.token_dim == 16
        assert "2 datasets, 8 checkpoints of 1,856 values" in result.stderr
        assert files(loragen.work) == {"c.yaml"}

    def test_a_dry_run_shows_every_step_of_the_decoder(self, loragen, config_file):
        dry = ("gen", "train", "-c", config_file, "--dry-run")
        result = loragen(*dry)
        made, header, *table = result.stderr.splitlines()[2:]
        assert made.startswith("decoder: hyperconv: A hyper-convolutional decoder, after Drag-and-")
        assert header.split() == ["decoder's", "step", "shape", "parameters", "MiB", "a", "pair"]
        names = [line.split()[0] for line in table[:4]]
        assert names == ["condition", "read", "expand", "blocks.0"]
        assert "directions of 1,856 values" in result.stderr
        document = json.loads(loragen(*dry, "--json").stdout)
        decoder = document["decoder"]
        assert decoder["stages"][-1]["shape"] == [116, 16]
        assert decoder["training_bytes"] == decoder["weights_bytes"] + 12 * decoder["trained"]
        assert document["config"]["layout"]["token_dim"] == 16

    def test_the_papers_geometry_trains_and_generates(self, loragen, config_file):
        shapes = "decoder={name: hyperconv, shapes: [[4, 8, 16], [24, 6, 12], [29, 8, 8]]}"
        train = ("gen", "train", "-c", config_file, "--set", shapes)
        result = loragen(*train, "--dry-run")
        assert result.exit_code == 0, result.output
        assert "29 x 8 x 8" in result.stderr
        result = loragen(*train, "--set", "training.max_steps=2")
        assert result.exit_code == 0, result.output
        model = result.stdout.strip()
        result = loragen("gen", "infer", "--model", model, *PROMPT, "--output", "a")
        assert result.exit_code == 0, result.output
        assert len(read_adapter(loragen.work / "a").tensors) > 0

    def test_test_mode_is_six_steps_of_each_phase(self, loragen, config_file):
        result = loragen("gen", "train", "-c", config_file, "--test-mode")
        assert result.exit_code == 0, result.output
        manifest = read_manifest(Path(result.stdout.strip()), GeneratorManifest)
        assert manifest.steps == 6

    def test_it_prints_the_experiment(self, loragen, config_file):
        arguments = ("gen", "train", "-c", config_file, "--set", "training.max_steps=2")
        result = loragen(*arguments)
        assert result.exit_code == 0, result.output
        (experiment,) = (loragen.work / "experiments").iterdir()
        assert result.stdout == f"experiments/{experiment.name}\n"
        assert read_manifest(experiment, GeneratorManifest).steps == 2
        assert (experiment / "results/final_model/generator_model.pt").is_file()
        result = loragen(*arguments, "--json")
        document = json.loads(result.stdout)
        assert (document["kind"], document["status"]) == ("generator", "success")

    def test_a_run_resumes_from_a_checkpoint(self, loragen, config_file, fails):
        run = loragen("gen", "train", "-c", config_file).stdout.strip()
        result = loragen("gen", "train", "--resume", run)
        assert result.exit_code == 0, result.output
        assert result.stdout == f"{run}\n"
        assert result.stderr.startswith(f"{run}: finished at step 8")
        (best,) = (loragen.work / run / "checkpoints").glob("epoch=*")
        result = loragen("gen", "train", "--resume_from_checkpoint", best, "--json")
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout)["resumed_from"]
        assert f"found {best.name}; " in result.stderr
        dry = loragen("gen", "train", "--resume", run, "--dry-run")
        assert (dry.exit_code, yaml.safe_load(dry.stdout)["seed"]) == (0, 42)
        for arguments in (("--set", "seed=3"), ("--set", "seed=3", "--dry-run")):
            error = fails(2, "gen", "train", "--resume", run, *arguments)
            assert error.startswith(f"{run} ")
            assert "seed is 3" in error

    def test_what_is_no_generator_run_cannot_be_resumed(self, fails, collection):
        error = fails(2, "gen", "train", "--resume", "none")
        assert error.startswith("none: no such run")
        error = fails(1, "gen", "train", "--resume", collection.runs["colors"])
        assert "lora train" in error

    def test_runs_are_named_on_the_command_line(self, loragen, config_file, collection):
        flags = [part for run in collection.runs.values() for part in ("--checkpoint_dir", run)]
        result = loragen(
            "gen", "train", "-c", config_file, "--set", "sources=[]", *flags, "--dry-run"
        )
        assert result.exit_code == 0, result.output
        assert yaml.safe_load(result.stdout)["data"]["checkpoint_dir"] == [
            str(run) for run in collection.runs.values()
        ]

    def test_prepared_prompts_are_named_on_the_command_line(
        self, loragen, fails, config_file, collection
    ):
        sources = [part for n in collection.names for part in ("--source", collection.file(n))]
        prepare = ("data", "prepare", *sources, "--output", "p")
        assert loragen(*prepare, "--samples-per-prompt", "2").exit_code == 0
        train = ("gen", "train", "-c", config_file, "--set", "training.max_steps=2")
        result = loragen(*train, "--prompts", "p", "--set", "data.pairing=tracked")
        assert result.exit_code == 0, result.output
        config = yaml.safe_load((loragen.work / result.stdout.strip() / "config.yaml").read_text())
        prepared = str(loragen.work / "p")  # found again from other directories
        assert (config["data"]["prompts"], config["data"]["pairing"]) == (prepared, "tracked")
        error = fails(2, *train, "--prompts", "p", "--set", "data.samples_per_prompt=4")
        assert "data.samples_per_prompt" in error
        assert "none: no such directory" in fails(2, *train, "--prompts", "none")

    def test_a_run_of_test_mode_has_to_be_named(
        self, loragen, fails, config_file, base_dir, dataset
    ):
        lora = ("lora", "train", "--dataset", dataset(), "--base-model", base_dir, "--test-mode")
        result = loragen(*lora, "--set", "loggers={}", "--set", "final_model=none")
        assert result.exit_code == 0, result.output
        train = ("gen", "train", "-c", config_file, "--set", "sources=[]", "--dry-run")
        error = fails(2, *train, "--checkpoint-dir", "runs")
        assert "1 of --test-mode" in error
        assert loragen(*train, "--checkpoint-dir", result.stdout.strip()).exit_code == 0

    @pytest.mark.parametrize("dry", [(), ("--dry-run",)])
    @pytest.mark.parametrize(
        "arguments, message",
        [
            (("--set", "sources=[]"), "--checkpoint-dir RUN"),
            (("--checkpoint-dir", "none"), "none: no such run directory"),
            (("--set", "layout.max_seq_len=5"), "layout.max_seq_len is 5"),
            (("--set", "decoder.blokcs=1"), "Did you mean 'blocks'?"),
            (("--set", "encoder.name=sbrt"), "Did you mean 'sbert'?"),
        ],
    )
    def test_what_cannot_start_is_a_usage_error(self, fails, config_file, dry, arguments, message):
        error = fails(2, "gen", "train", "-c", config_file, *arguments, *dry)
        assert message in error

    def test_prompts_may_be_a_hub_dataset(self, loragen, fails, config_file, collection, hub):
        run = collection.runs["colors"]

        def arguments(prompts):
            sources = json.dumps([{"run": str(run), "prompts": prompts}])
            return ("gen", "train", "-c", config_file, "--set", f"sources={sources}", "--dry-run")

        result = loragen(*arguments("hub:owner/colors:main"))
        assert result.exit_code == 0, result.output
        assert "hub:owner/name" in fails(2, *arguments("hub:owner"))
        error = fails(2, *arguments("none.txt"))
        assert error.startswith("--set: sources.0.prompts: none.txt: ")


class TestInfer:
    def test_prompts_become_an_adapter(self, loragen, experiment):
        result = loragen(
            "gen", "infer", "--model", experiment, *PROMPT, "--prompt", "x", "--output", "a/b"
        )
        assert result.exit_code == 0, result.output
        assert result.stdout == "a/b\n"
        assert "1,856 values from 2 prompts in " in result.stderr
        assert files(loragen.work) == {
            "a/b/README.md",
            "a/b/adapter_config.json",
            "a/b/adapter_model.safetensors",
        }

    def test_one_json_document(self, loragen, experiment, collection):
        result = loragen(
            "gen", "infer", "--model", experiment, *PROMPT, "--output", "adapter", "--json"
        )
        assert result.exit_code == 0, result.output
        document = json.loads(result.stdout)
        assert document["adapter"] == "adapter"
        assert document["base_model"] == str(collection.base)
        assert (document["values"], document["prompts"]) == (1856, 1)
        assert document["seconds"] > 0

    def test_prompts_from_a_file_and_the_model_file_itself(self, loragen, experiment, collection):
        model = experiment / "results/final_model/generator_model.pt"
        for limit, count in (((), 16), (("--limit", 5), 5)):
            result = loragen(
                "gen", "infer", "--model", model, "--prompt_file", collection.file("colors"),
                "--output", f"adapter{count}", "--json", *limit,
            )  # fmt: skip
            assert result.exit_code == 0, result.output
            assert json.loads(result.stdout)["prompts"] == count

    def test_prompts_from_the_hub(self, loragen, experiment, monkeypatch):
        rows = [{"prompt": "about red?"}, {"prompt": "about blue?"}]
        monkeypatch.setattr("loragen.core.data.documents.read_hub", lambda *_: rows)
        result = loragen(
            "gen", "infer", "--model", experiment, "--prompt-file", "hub:owner/colors",
            "--output", "adapter", "--json",
        )  # fmt: skip
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout)["prompts"] == 2

    def test_an_existing_output_is_kept_unless_forced(self, fails, loragen, experiment):
        arguments = ("gen", "infer", "--model", experiment, "--output", "adapter")
        assert loragen(*arguments, *PROMPT).exit_code == 0
        before = read_adapter(loragen.work / "adapter").tensors
        own = loragen.work / "adapter" / "mine.txt"
        own.touch()
        other = ("--prompt", "something else entirely")
        assert "exists already" in fails(2, *arguments, *other)
        assert loragen(*arguments, *other, "--force").exit_code == 0
        assert own.exists()
        after = read_adapter(loragen.work / "adapter").tensors
        assert any(not after[key].equal(before[key]) for key in before)

    @pytest.mark.parametrize(
        "code, arguments, message",
        [
            (2, (), "no prompts"),
            (2, ("--prompt-file", "hub:a"), "hub:a: expected hub:owner/name"),
            (2, ("--prompt-file", "none.txt"), "none.txt: no such"),
            (1, ("--prompt-file", "empty.txt"), "empty.txt: no prompts"),
        ],
    )
    def test_prompts_that_are_not_there(self, fails, experiment, code, arguments, message):
        (fails.loragen.work / "empty.txt").touch()
        error = fails(code, "gen", "infer", "--model", experiment, "--output", "a", *arguments)
        assert error.startswith(message)

    @pytest.mark.parametrize("model", ["none", ".", "none.pt"])
    def test_a_model_that_is_not_there_is_a_usage_error(self, fails, model):
        error = fails(2, "gen", "infer", "--model", model, *PROMPT, "--output", "a")
        assert error.startswith(f"{model}: no generator")

    def test_a_file_that_is_no_generator_is_one_line(self, fails):
        torch.save({"x": 1}, fails.loragen.work / "x.pt")
        error = fails(1, "gen", "infer", "--model", "x.pt", *PROMPT, "--output", "a")
        assert error.startswith("x.pt: ")

    def test_a_generated_adapter_is_evaluated_like_any_other(self, loragen, experiment, collection):
        assert loragen(
            "gen", "infer", "--model", experiment, *PROMPT, "--output", "adapter"
        ).exit_code == 0  # fmt: skip
        result = loragen(
            "lora", "eval", "--adapter", "adapter", "--dataset", collection.file("colors"), "--json"
        )
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout)["base_model"] == str(collection.base)

    def test_without_an_output_a_new_directory_is_made(self, loragen, experiment):
        for number in (1, 2):
            result = loragen("gen", "infer", "--model", experiment, *PROMPT)
            assert result.exit_code == 0, result.output
            assert result.stdout == f"generated/adapter-00{number}\n"
            assert read_adapter(loragen.work / "generated" / f"adapter-00{number}").tensors

    @pytest.mark.parametrize("form, suffix", [((), ""), (("--format", "pt"), ".pt")])
    def test_one_adapter_a_group_or_a_line(self, loragen, experiment, form, suffix):
        rows = [{"prompt": f"about {w}?", "set": w} for w in ("red", "cat", "red")]
        lines = "".join(f"{json.dumps(row)}\n" for row in rows)
        (loragen.work / "rows.jsonl").write_text(lines, encoding="utf-8")
        arguments = ("gen", "infer", "--model", experiment, "--prompt-file", "rows.jsonl", *form)
        result = loragen(*arguments, "--per", "set", "--output", "sets")
        assert result.exit_code == 0, result.output
        assert result.stdout == f"sets/red{suffix}\nsets/cat{suffix}\n"
        result = loragen(*arguments, "--per", "line", "--output", "lines", "--json")
        made = json.loads(result.stdout)["adapters"]
        assert [one["adapter"] for one in made] == [
            f"lines/prompt-00{number}{suffix}" for number in (1, 2, 3)
        ]
        assert "exists already" in loragen(*arguments, "--per", "set", "--output", "sets").stderr

    def test_the_original_spelling_writes_one_file(self, loragen, experiment):
        result = loragen(
            "gen", "infer", "--model", experiment / "results/final_model/generator_model.pt",
            *PROMPT, "--output", "results/generated_params.pt",
        )  # fmt: skip
        assert result.exit_code == 0, result.output
        assert files(loragen.work) == {"results/generated_params.pt"}
        torch.load(loragen.work / "results/generated_params.pt", weights_only=True)

    def test_merged_models(self, loragen, experiment):
        result = loragen("gen", "infer", "--model", experiment, *PROMPT, "--merge", "--output", "m")
        assert result.exit_code == 0, result.output
        assert {"m/config.json", "m/model.safetensors", "m/README.md"} <= files(loragen.work)

    def test_prompts_out_of_distribution_are_warned_of(self, loragen, experiment):
        far = [part for i in range(8) for part in ("--prompt", f"{i} {{[(<=>)]}} ;;;; @#$%^&*")]
        result = loragen("gen", "infer", "--model", experiment, *far, "--output", "a", "--json")
        document = json.loads(result.stdout)
        assert document["far"] is True
        assert document["distance"] > 1
        assert f"warning: {document['warning']}\n" in result.stderr

    @pytest.mark.parametrize(
        "arguments, message",
        [
            (("--output", "a", "--format", "pt"), "--format: "),
            (("--output", "a", "--base-model", "demo"), "--base-model: "),
            (("--output", "a.pt", "--merge"), "--merge"),
            (("--output", "a.pt", "--per", "line"), "a.pt: --per"),
            (("--output", "a.ckpt"), "a.ckpt: "),
            (("--output", "a", "--per", "set"), "--per set: "),
            (("--output", "a", "--draws", "3"), "3 random draws"),
        ],
    )
    def test_options_that_contradict(self, fails, experiment, arguments, message):
        error = fails(2, "gen", "infer", "--model", experiment, *PROMPT, *arguments)
        assert error.startswith(message)


class TestEval:
    def test_the_tables_and_their_conclusions(self, loragen, arguments):
        result = loragen(*arguments, "--output", "out")
        assert result.exit_code == 0, result.output
        header, *rows = result.stdout.split("\n\n")[0].splitlines()
        assert header.split("  ")[0] == "exact match"
        assert "base  4-shot  mean  nearest  ridge  arrow  generated" in header
        assert header.endswith("other prompts  gibberish")
        assert [row.split()[0] for row in rows] == ["animals", "colors", "mean"]
        assert "generated: " in result.stdout
        assert {file.name for file in (loragen.work / "out").iterdir()} == {
            "results.json", "results.md", "results.html", "results.png",
        }  # fmt: skip
        again = loragen(*arguments, "--output", "out")
        assert again.exit_code == 2
        assert "out exists" in again.stderr

    def test_json_is_one_document_with_the_columns_asked_for(self, loragen, arguments):
        result = loragen(*arguments, "--columns", "base,generated", "--json")
        document = json.loads(result.stdout)
        assert document["columns"] == ["base", "generated"]
        assert document["options"]["draws"] == 2
        assert [one["rows"] for one in document["datasets"]] == [4, 4]
        assert set(document["novelty"]["groups"]["all"]) == {"delta_w", "factors"}
        assert [len(one["correct"]["generated"]) for one in document["datasets"]] == [2, 2]

    def test_without_the_training_runs_what_needs_them_is_left_out(
        self, loragen, arguments, experiment, tmp_path, monkeypatch
    ):
        import torch

        document = torch.load(experiment / GENERATOR_FILE, weights_only=True)
        for record in document["provenance"]["source_records"]:
            record["place"] = str(tmp_path / "elsewhere")
        torch.save(document, loragen.work / "moved.pt")
        moved = ("gen", "eval", "--model", "moved.pt", *arguments[4:])
        result = loragen(*moved, "--json")
        assert result.exit_code == 0, result.output
        assert "warning: " in result.stderr
        results = json.loads(result.stdout)
        assert results["columns"] == [
            "base", "few_shot", "mean", "generated", "other_prompts", "gibberish_prompts",
        ]  # fmt: skip
        assert results["novelty"] is None
        first = ("gen", "eval", "--model", "moved.pt", *arguments[4:6], "--limit", 4, "--json")
        alone = json.loads(loragen(*first).stdout)
        assert alone["columns"] == ["base", "few_shot", "mean", "generated", "gibberish_prompts"]
        asked = loragen(*moved, "--columns", "nearest")
        assert asked.exit_code == 2
        assert "elsewhere" in asked.stderr

    def test_a_generator_of_peft_adapters_finds_their_prompts_again(
        self, loragen, gen_config, collection, tmp_path, monkeypatch
    ):
        from loragen.core.adapter.files import read_adapter, write_adapter
        from loragen.core.learning.train import train
        from loragen.core.progress import Silent

        adapter = read_adapter(collection.runs["colors"] / "adapter")
        for step in (1, 2, 3):
            write_adapter(tmp_path / "theirs" / f"step-{step}", adapter, "")
        prompts = shutil.copy(collection.file("colors"), tmp_path / "prompts.jsonl")
        monkeypatch.chdir(tmp_path)
        source = {"checkpoints": "theirs", "prompts": prompts.name}
        run = train(gen_config({"sources": [source], "data.max_checkpoints": 2}), Silent())
        (record,) = run.manifest.source_records
        assert (record.place, record.prompts_from) == (str(tmp_path / "theirs"), str(prompts))
        assert record.count == 2
        monkeypatch.chdir(loragen.work)
        wanted = ("--dataset", collection.file("colors"), "--limit", 4, "--draws", 2)
        result = loragen("gen", "eval", "--model", run.directory, *wanted, "--json")
        assert result.exit_code == 0, result.output
        results = json.loads(result.stdout)
        assert "nearest" in results["columns"]
        assert "ridge" not in results["columns"]
        assert "ridge needs 2 training datasets; arrow needs 2" in result.stderr
        assert results["datasets"][0]["novelty"]["delta_w"] >= 0

    def test_a_folder_of_two_splits_can_have_an_oracle(self, loragen, experiment, collection):
        for split in ("train", "test"):
            place = loragen.work / "data" / "colors" / f"{split}.jsonl"
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(collection.file("colors"), place)
        wanted = ("--dataset", "colors", "--data-root", "data", "--columns", "base", "--oracle")
        result = loragen("gen", "eval", "--model", experiment, *wanted, "--json")
        assert result.exit_code == 0, result.output
        document = json.loads(result.stdout)
        assert document["columns"] == ["base", "oracle"]
        assert document["datasets"][0]["prompts_from"] == "train split"
        again = loragen("gen", "eval", "--model", experiment, *wanted)
        assert "colors: already trained" in again.stderr

    @pytest.mark.parametrize(
        "more, message",
        [
            (("--columns", "bse"), "Did you mean 'base'?"),
            (("--oracle-dir", "nowhere"), "--oracle-dir: nowhere: no such directory"),
            (("--dataset", "nothing.jsonl"), "nothing.jsonl: "),
            (("--model", "nowhere"), "nowhere: "),
        ],
    )
    def test_what_cannot_start_is_a_usage_error(self, fails, arguments, more, message):
        assert message in fails(2, *arguments, *more)

    def test_prompts_of_a_train_split_need_one(self, fails, arguments):
        problems = fails(2, *arguments, "--prompts-from", "train", lines=2)
        assert problems[0].endswith("no train split to take prompts from")

    def test_too_few_prompts_are_an_error_before_training(self, loragen, fails, experiment):
        line = json.dumps({"prompt": "One?", "response": "one"}) + "\n"
        for split in ("train", "test"):
            place = loragen.work / "data" / "single" / f"{split}.jsonl"
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(line, encoding="utf-8")
        wanted = ("--dataset", "single", "--data-root", "data", "--oracle", "--multi-task")
        problem = fails(2, "gen", "eval", "--model", experiment, *wanted)
        assert "need more than 1 prompts" in problem
        assert not (loragen.work / ".loragen-cache").exists()

    def test_an_oracle_needs_labels_of_its_own(self, fails, arguments):
        problems = fails(2, *arguments, "--oracle", lines=2)
        assert problems[0].startswith("animals: ")
