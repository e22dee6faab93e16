"""Adapters from the hub and to it, by every command that reads or pushes one."""

import json
import shutil

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.repocard import metadata_load
from safetensors import safe_open

from loragen.core.adapter.export import front_matter, hub_datasets
from loragen.core.adapter.files import read_adapter
from loragen.core.run.directory import DatasetRecord
from loragen.testing.adapters import peft_adapter
from tests.conftest import lora_manifest


@pytest.fixture
def published(hub, run):
    """The adapter of a run, on the hub."""
    return hub.upload("me/colors", run / "adapter")


class TestReading:
    def test_an_adapter_is_evaluated(self, loragen, hub, published, file, run):
        given = ("lora", "eval", "--dataset", file, "--json", "--adapter")
        result = loragen(*given, "hf://me/colors")
        assert result.exit_code == 0, result.output
        there, here = json.loads(result.stdout), json.loads(loragen(*given, run).stdout)
        assert there["adapter"] == "hf://me/colors"
        assert (there["loss"], there["exact_match"]) == (here["loss"], here["exact_match"])

    def test_a_revision_and_a_folder(self, loragen, hub, published, collection):
        animals = collection.runs["animals"]
        hub.upload("me/colors", animals / "adapter")
        hub.upload("me/runs", animals.parent)
        wanted = [collection.runs["colors"] / "adapter", animals / "adapter", animals / "adapter"]
        sources = [f"hf://me/colors@{published}", "hf://me/colors", f"hf://me/runs/{animals.name}"]
        for number, (source, own) in enumerate(zip(sources, wanted, strict=True)):
            result = loragen("lora", "export", source, "--output", f"mine-{number}")
            assert result.exit_code == 0, result.output
            tensors = read_adapter(loragen.work / f"mine-{number}").tensors
            ours = read_adapter(own).tensors
            assert all(tensors[key].equal(ours[key]) for key in ours), source

    def test_an_analysis_has_the_name_of_the_repository(self, loragen, hub, published):
        result = loragen("ckpt", "analyze", "hf://me/colors", "--json")
        assert result.exit_code == 0, result.output
        assert [one["name"] for one in json.loads(result.stdout)["collections"]] == ["colors"]

    def test_a_generator_learns_from_a_folder_of_runs(
        self, loragen, hub, collection, gen_config, tmp_path
    ):
        from loragen.core.config import dump

        for run in collection.runs.values():
            hub.commit(
                "me/runs",
                {
                    f"{run.name}/{path.relative_to(run).as_posix()}": path.read_bytes()
                    for path in run.rglob("*")
                    if path.is_file()
                },
            )
        config = gen_config({"sources": []})
        (tmp_path / "gen.yaml").write_text(dump(config), encoding="utf-8")
        given = ("--config", tmp_path / "gen.yaml", "--checkpoint-dir", "hf://me/runs")
        result = loragen("gen", "train", *given, "--dry-run")
        assert result.exit_code == 0, result.output
        assert "2 datasets" in result.stderr

    def test_the_cache_answers_where_the_hub_does_not(self, loragen, hub, published, monkeypatch):
        from huggingface_hub import constants

        from loragen.core import hub as ours

        assert loragen("lora", "export", "hf://me/colors", "--output", "a").exit_code == 0
        ours._downloaded.cache_clear()
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert loragen("lora", "export", "hf://me/colors", "--output", "b").exit_code == 0

    @pytest.mark.parametrize(
        ("source", "message"),
        [
            ("hf://me/nothing", "no such repository"),
            ("hf://me/colors@v9", "no such revision"),
            ("hf://me/colors/there", "has no there"),
            ("hf://colors", "expected hf://owner/name"),
            ("hf://me/colors/../other", "expected hf://owner/name"),
        ],
    )
    def test_what_is_not_there_is_one_line(self, fails, hub, published, source, message):
        assert message in fails(2, "lora", "export", source, "--output", "mine")

    def test_a_malformed_source_of_a_generator(self, fails, hub):
        error = fails(2, "gen", "train", "--checkpoint-dir", "hf://colors", "--dry-run")
        assert "expected hf://owner/name" in error
        assert hub.requests == []


class TestPushing:
    def test_an_exported_adapter(self, loragen, hub, run):
        given = ("--push-to-hub", "me/mine", "--private", "--license", "apache-2.0")
        result = loragen("lora", "export", run, "--output", "mine", *given, "--json")
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout)["repository"].endswith("/me/mine")
        files = hub.newest("me/mine")
        assert hub.private == {"me/mine": True}
        assert set(files) == {
            ".gitattributes",
            "README.md",
            "adapter_config.json",
            "adapter_model.safetensors",
        }
        card = ModelCard(files["README.md"].decode())
        assert card.data.license == "apache-2.0"
        assert 'PeftModel.from_pretrained(base, "me/mine")' in card.text
        assert "written by loragen beside" not in card.text

    def test_what_others_have_put_there_stays_here(self, loragen, hub, run):
        assert loragen("lora", "export", run, "--output", "mine").exit_code == 0
        (loragen.work / "mine" / "secret.txt").write_text("mine", encoding="utf-8")
        given = ("--output", "mine", "--force", "--push-to-hub", "me/mine")
        assert loragen("lora", "export", run, *given).exit_code == 0
        assert "secret.txt" not in hub.newest("me/mine")

    def test_without_a_directory_nothing_stays(self, loragen, hub, run):
        result = loragen("lora", "export", run, "--push-to-hub", "me/mine")
        assert result.exit_code == 0, result.output
        assert result.stdout.endswith("/me/mine\n")
        assert list(loragen.work.iterdir()) == []
        assert loragen("lora", "export", "hf://me/mine", "--output", "back").exit_code == 0
        ours = read_adapter(run / "adapter").tensors
        back = read_adapter(loragen.work / "back").tensors
        assert all(back[key].equal(ours[key]) for key in ours)

    def test_a_generated_adapter_keeps_its_lineage(self, loragen, hub, experiment):
        given = ("--prompt", "Question 1 about red?", "--push-to-hub", "me/new", "--json")
        result = loragen("gen", "infer", "--model", experiment, *given)
        assert result.exit_code == 0, result.output
        document = json.loads(result.stdout)
        assert document["repository"].endswith("/me/new")
        assert b"generated" in hub.newest("me/new")["README.md"]
        assert loragen("lora", "export", "hf://me/new", "--output", "back").exit_code == 0
        with safe_open(loragen.work / "back" / "adapter_model.safetensors", "pt") as file:
            lineage = json.loads(file.metadata()["lineage"])
        assert lineage["command"] == "gen infer"
        assert lineage["prompts_sha256"] == document["prompts_sha256"]

    def test_a_merged_model(self, loragen, hub, run):
        result = loragen("lora", "export", run, "--merge", "--push-to-hub", "me/whole")
        assert result.exit_code == 0, result.output
        assert {"config.json", "model.safetensors", "README.md"} <= set(hub.newest("me/whole"))

    @pytest.mark.parametrize("repository", ["mine", "me/mi ne", "me/x/y"])
    def test_an_id_that_the_hub_does_not_take(self, fails, hub, run, repository):
        fails(2, "lora", "export", run, "--push-to-hub", repository)
        assert hub.requests == []

    def test_a_token_is_needed(self, fails, hub, run, monkeypatch, tmp_path):
        from huggingface_hub import constants

        monkeypatch.delenv("HF_TOKEN")
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
        assert "hf auth login" in fails(2, "lora", "export", run, "--push-to-hub", "me/mine")
        monkeypatch.setenv("HF_TOKEN", "hf_wrong")
        assert "401" in fails(1, "lora", "export", run, "--push-to-hub", "me/mine")

    def test_several_adapters_are_not_pushed(self, fails, hub, experiment):
        given = ("--prompt", "a", "--prompt", "b", "--per", "line", "--push-to-hub", "me/new")
        assert "--per" in fails(2, "gen", "infer", "--model", experiment, *given)


# ---------------------------------------------------------------------------- cards


def test_the_card_of_a_run_passes_the_hubs_library(run, tmp_path):
    """What `ModelCard.validate` checks beyond this, it asks the hub."""
    card = ModelCard.load(run / "adapter" / "README.md")
    assert card.data.to_dict() == metadata_load(run / "adapter" / "README.md")
    found = card.data.to_dict()
    assert found["library_name"] == "peft"
    assert found["pipeline_tag"] == "text-generation"
    assert "base_model" not in found  # a path would be a broken link
    shutil.copy(run / "adapter" / "README.md", tmp_path)
    card.save(tmp_path / "again.md")
    assert metadata_load(tmp_path / "again.md") == found


@pytest.mark.parametrize("name", ["123/456", "owner/1e5", "me/2026-01-01", "y/no"])
def test_an_id_stays_a_text_whatever_yaml_makes_of_it(name):
    card = ModelCard(front_matter(name, datasets=[name], license_id="mit") + "# Text\n")
    found = card.data.to_dict()
    assert (found["base_model"], found["datasets"]) == (name, [name])
    assert found["tags"] == [f"base_model:adapter:{name}", "lora", "loragen"]
    assert found["license"] == "mit"
    assert found["base_model_relation"] == "adapter"


def test_the_licence_of_a_base_is_that_of_its_card(base_dir, tmp_path):
    base = shutil.copytree(base_dir, tmp_path / "base")
    for text, wanted in (("license: apache-2.0", "apache-2.0"), ("license: [a, b]", None)):
        (base / "README.md").write_text(f"---\n{text}\n---\n", encoding="utf-8")
        data = ModelCard(front_matter(str(base)) + "# Text\n").data
        assert data.license == wanted


def test_a_dataset_of_the_hub_is_linked_and_no_file_is():
    dataset = DatasetRecord(name="boolq", path="hub:google/boolq@train", sha256="0", rows=1)
    manifest = lora_manifest(dataset=dataset)
    lineage = manifest.lineage(8, "run")
    assert hub_datasets(lineage) == ["google/boolq"]
    manifest.dataset.path = "/data/boolq.jsonl"
    lineage = manifest.lineage(8, "run")
    assert hub_datasets(lineage) == []
    assert "/data" not in json.dumps(lineage)


# ---------------------------------------------------------------------------- servers


class TestServers:
    @pytest.fixture
    def theirs(self, tmp_path):
        return peft_adapter(tmp_path / "theirs", alpha_pattern={"v_proj": 3})

    def test_an_export_says_which_servers_scale_it_wrongly(self, loragen, theirs):
        result = loragen("lora", "export", theirs, "--output", "mine")
        assert result.exit_code == 0, result.output
        assert "vLLM, SGLang, LoRAX, llama.cpp: ignores alpha_pattern" in result.stderr
        assert "--for vllm mends it" in result.stderr

    def test_the_form_for_a_server_and_its_command(self, loragen, theirs):
        result = loragen("lora", "export", theirs, "--output", "mine", "--for", "vllm")
        assert result.exit_code == 0, result.output
        assert "ignores" not in result.stderr
        assert "--max-lora-rank 8 --lora-modules adapter=mine" in result.stderr
        config = json.loads((loragen.work / "mine" / "adapter_config.json").read_text())
        assert "alpha_pattern" not in config

    def test_what_a_server_refuses_is_refused_here(self, fails, tmp_path):
        theirs = peft_adapter(tmp_path / "theirs", use_dora=True)
        error = fails(1, "lora", "export", theirs, "--output", "mine", "--for", "llama.cpp")
        assert "DoRA" in error
        assert "--merge" in error

    def test_a_merged_model_has_no_form(self, fails, run):
        given = ("--output", "mine", "--merge", "--for", "vllm")
        assert "--for" in fails(2, "lora", "export", run, *given)


def test_the_command_lines_of_the_harness(loragen, run, file, collection):
    given = ("lora", "eval", "--dataset", file, "--show-lm-eval", "--limit", "3")
    base, adapter = loragen(*given, "--adapter", run).stdout.splitlines()
    start = f"lm_eval --model hf --model_args pretrained={collection.base}"
    end = " --apply_chat_template --batch_size 32 --limit 3"
    assert base.startswith(f"{start} --tasks colors")
    assert adapter.startswith(f"{start},peft={run / 'adapter'} --tasks ")
    assert base.endswith(end)
    assert adapter.endswith(end)
    alone = loragen(*given, "--no-adapter", "--base-model", "owner/base", "--json")
    (command,) = json.loads(alone.stdout)["commands"]
    assert "pretrained=owner/base " in command


def test_the_harness_reads_no_single_checkpoint(fails, run, file):
    checkpoint = sorted((run / "checkpoints").iterdir())[0]
    given = ("lora", "eval", "--dataset", file, "--show-lm-eval", "--adapter", checkpoint)
    assert "lora export" in fails(2, *given)
