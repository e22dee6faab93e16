import json
from pathlib import Path

import pytest
import torch
import yaml

from loragen.core.adapter.files import read_adapter
from loragen.core.config import GenTrainConfig
from loragen.core.run.directory import GeneratorManifest, read_manifest

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


class TestTrain:
    def test_a_dry_run_checks_everything_and_touches_nothing(self, loragen, config_file):
        result = loragen("gen", "train", "--config", config_file, "--dry-run")
        assert result.exit_code == 0, result.output
        config = GenTrainConfig.model_validate(yaml.safe_load(result.stdout))
        assert config.layout.token_dim == 16
        assert result.stderr.startswith("2 datasets, 8 checkpoints of 1,856 values -> ")
        assert files(loragen.work) == {"c.yaml"}

    def test_a_dry_run_shows_every_step_of_the_decoder(self, loragen, config_file):
        dry = ("gen", "train", "-c", config_file, "--dry-run")
        result = loragen(*dry)
        header, *table = result.stderr.splitlines()[2:]
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

    def test_a_run_goes_on_from_a_checkpoint(self, loragen, config_file, fails):
        run = loragen("gen", "train", "-c", config_file).stdout.strip()
        result = loragen("gen", "train", "--resume", run)
        assert result.exit_code == 0, result.output
        assert result.stdout == f"{run}\n"
        assert result.stderr == f"{run}: finished at step 8, nothing is left to do\n"
        (best,) = (loragen.work / run / "checkpoints").glob("epoch=*")
        result = loragen("gen", "train", "--resume_from_checkpoint", best, "--json")
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout)["resumed_from"]
        assert f"found {best.name}; " in result.stderr
        dry = loragen("gen", "train", "--resume", run, "--dry-run")
        assert (dry.exit_code, yaml.safe_load(dry.stdout)["seed"]) == (0, 42)
        for arguments in (("--set", "seed=3"), ("--set", "seed=3", "--dry-run")):
            error = fails(2, "gen", "train", "--resume", run, *arguments)
            assert error == f"{run} cannot go on: seed is 3, the run has 42"

    def test_what_cannot_go_on_is_told_by_name(self, fails, collection):
        error = fails(2, "gen", "train", "--resume", "none")
        assert error == "none: no such run or checkpoint"
        error = fails(1, "gen", "train", "--resume", collection.runs["colors"])
        assert error.endswith("is a run of lora train, not of gen train")

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
        assert "set data.samples_per_prompt to 2 (it is 4)" in error
        assert "none: no such directory of prompts" in fails(2, *train, "--prompts", "none")

    def test_a_run_with_test_mode_is_taken_only_by_name(
        self, loragen, fails, config_file, base_dir, dataset
    ):
        lora = ("lora", "train", "--dataset", dataset(), "--base-model", base_dir, "--test-mode")
        result = loragen(*lora, "--set", "loggers={}", "--set", "final_model=none")
        assert result.exit_code == 0, result.output
        train = ("gen", "train", "-c", config_file, "--set", "sources=[]", "--dry-run")
        error = fails(2, *train, "--checkpoint-dir", "runs")
        assert "(0 not finished, 1 of --test-mode)" in error
        assert loragen(*train, "--checkpoint-dir", result.stdout.strip()).exit_code == 0

    @pytest.mark.parametrize("dry", [(), ("--dry-run",)])
    @pytest.mark.parametrize(
        "arguments, message",
        [
            (("--set", "sources=[]"), "nothing to learn from: give --checkpoint-dir RUN"),
            (("--checkpoint-dir", "none"), "none: no such run directory"),
            (("--set", "layout.max_seq_len=5"), "layout.max_seq_len is 5: set it to 116 or auto"),
            (("--set", "decoder.blokcs=1"), "unknown key. Did you mean 'blocks'?"),
            (("--set", "encoder.name=sbrt"), "unknown encoder 'sbrt'. Did you mean 'sbert'?"),
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
        assert "expected hub:owner/name" in fails(2, *arguments("hub:owner"))
        error = fails(2, *arguments("none.txt"))
        assert error == "--set: sources.0.prompts: none.txt: no such prompt file"


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
        (loragen.work / "adapter" / "mine.txt").touch()
        other = ("--prompt", "something else entirely")
        assert "exists already" in fails(2, *arguments, *other)
        assert loragen(*arguments, *other, "--force").exit_code == 0
        assert not (loragen.work / "adapter" / "mine.txt").exists()
        after = read_adapter(loragen.work / "adapter").tensors
        assert any(not after[key].equal(before[key]) for key in before)

    @pytest.mark.parametrize(
        "code, arguments, message",
        [
            (2, (), "no prompts: give --prompt TEXT (repeatable) or --prompt-file FILE"),
            (2, ("--prompt-file", "hub:a"), "hub:a: expected hub:owner/name, hub:owner/name:conf"),
            (2, ("--prompt-file", "none.txt"), "none.txt: no such prompt file"),
            (1, ("--prompt-file", "empty.txt"), "empty.txt: no prompts in it"),
        ],
    )
    def test_prompts_that_are_not_there(self, fails, experiment, code, arguments, message):
        (fails.loragen.work / "empty.txt").touch()
        error = fails(code, "gen", "infer", "--model", experiment, "--output", "a", *arguments)
        assert error.startswith(message)

    def test_a_prompt_without_text_is_no_prompt(self, fails, experiment):
        error = fails(2, "gen", "infer", "--model", experiment, "--output", "a", "--prompt", " ")
        assert "no prompts" in error

    @pytest.mark.parametrize("model", ["none", ".", "none.pt"])
    def test_a_model_that_is_not_there_is_a_usage_error(self, fails, model):
        error = fails(2, "gen", "infer", "--model", model, *PROMPT, "--output", "a")
        assert error.startswith(f"{model}: no generator there")

    def test_a_file_that_is_no_generator_is_one_line(self, fails):
        torch.save({"x": 1}, fails.loragen.work / "x.pt")
        error = fails(1, "gen", "infer", "--model", "x.pt", *PROMPT, "--output", "a")
        assert error.startswith("x.pt: not a generator file")

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

    def test_far_prompts_are_told(self, loragen, experiment):
        far = [part for i in range(8) for part in ("--prompt", f"{i} {{[(<=>)]}} ;;;; @#$%^&*")]
        result = loragen("gen", "infer", "--model", experiment, *far, "--output", "a", "--json")
        document = json.loads(result.stdout)
        assert document["far"] is True
        assert document["distance"] > 1
        assert f"warning: {document['warning']}\n" in result.stderr

    @pytest.mark.parametrize(
        "arguments, message",
        [
            (("--output", "a", "--format", "pt"), "--format goes with --per"),
            (("--output", "a", "--base-model", "demo"), "--base-model goes with --merge"),
            (("--output", "a.pt", "--merge"), "--merge writes directories"),
            (("--output", "a.pt", "--per", "line"), "a.pt: --per writes a directory"),
            (("--output", "a.ckpt"), "a.ckpt: write a directory (PEFT), or"),
            (("--output", "a", "--per", "set"), "--per set: "),
            (("--output", "a", "--draws", "3"), "3 random draws of 1 prompts each need more"),
        ],
    )
    def test_options_that_contradict(self, fails, experiment, arguments, message):
        error = fails(2, "gen", "infer", "--model", experiment, *PROMPT, *arguments)
        assert error.startswith(message)
