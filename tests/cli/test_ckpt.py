"""`loragen ckpt`."""

import json
import shutil

import pytest
import torch

from loragen.core.data.batches import batch_indices
from tests.processes import run_in_turn


def damaged(run, directory):
    """A copy of the run with a NaN in one checkpoint."""
    copy = shutil.copytree(run, directory / "damaged")
    file = copy / "checkpoints" / "checkpoint-step-006.ckpt"
    document = torch.load(file, weights_only=True)
    next(iter(document["state_dict"].values()))[0, 0] = float("nan")
    torch.save(document, file)
    return copy


def test_provenance_needs_no_torch(run, file):
    """From (seed, step) alone: no torch, no model."""
    uses = ["data", "uses", f"{file}:2", "--run", run]
    lines = ["ckpt", "lines", run / "checkpoints" / "checkpoint-step-006.ckpt"]
    for command, (code, out, err, heavy) in run_in_turn([uses, lines]):
        assert (code, err, heavy) == (0, "", []), command
        assert out, command


class TestAnalyze:
    def test_one_json_document(self, loragen, run):
        result = loragen("ckpt", "analyze", run, "--json")
        assert result.exit_code == 0, result.output
        document = json.loads(result.stdout)
        assert document.keys() == {"collections", "comparisons", "not_compared", "twins"}
        (report,) = document["collections"]
        assert report["path"] == str(run)
        assert (report["checkpoints"], report["values"], report["scaling"]) == (4, 1856, 2.0)
        assert len(report["drift"]) == len(report["sample"]["cosine"]) == 4
        assert 1 <= report["modules"][0]["effective_rank"] <= 2
        assert report["detour"] >= 1
        assert result.stderr == ""

    def test_the_original_spelling_works_and_no_path_is_a_usage_error(self, loragen, run):
        result = loragen("ckpt", "analyze", "--checkpoint_dir", run / "checkpoints", "--json")
        assert json.loads(result.stdout)["collections"][0]["checkpoints"] == 4
        result = loragen("ckpt", "analyze")
        assert result.exit_code == 2
        assert "nothing to analyse" in result.stderr

    def test_several_collections_are_compared(self, loragen, collection):
        result = loragen("ckpt", "analyze", *collection.runs.values(), "--json")
        document = json.loads(result.stdout)
        assert [report["checkpoints"] for report in document["collections"]] == [4, 4]
        (comparison,) = document["comparisons"]
        assert comparison["collections"] == [run.name for run in collection.runs.values()]
        text = loragen("ckpt", "analyze", *collection.runs.values()).stdout
        assert "mean ‖ΔW‖" in text
        assert "cosine of the last ΔW" in text
        assert "1.000" in text

    def test_a_folder_of_runs_is_all_of_them(self, loragen, collection):
        folder = next(iter(collection.runs.values())).parent
        document = json.loads(loragen("ckpt", "analyze", folder, "--json").stdout)
        assert len(document["collections"]) == 2

    def test_a_table_shows_the_first_and_the_last(self, loragen, run):
        result = loragen("ckpt", "analyze", run)
        assert result.exit_code == 0, result.output
        assert "4 checkpoints, " in result.stdout
        assert "1,856 values in 28 tensors (float32); scaling 2" in result.stdout
        assert "... 2 more (--all shows them) ..." in result.stdout  # 14 modules
        assert "model.layers.1.mlp.up_proj" in result.stdout
        assert "checkpoint-step-008.ckpt" in result.stdout
        assert "times the straight line" in result.stdout
        assert "NaN or infinity: none" in result.stdout
        every = loragen("ckpt", "analyze", run, "--all").stdout
        assert "more (--all" not in every
        assert every.count("_proj") == 14

    def test_many_collections_are_not_shown_module_by_module(self, loragen, run):
        files = sorted((run / "checkpoints").glob("checkpoint*"))
        text = loragen("ckpt", "analyze", *files).stdout
        assert "_proj" not in text
        assert "cosine of the last ΔW" in text
        assert (
            "model.layers.0.self_attn.q_proj" in loragen("ckpt", "analyze", *files, "--all").stdout
        )

    def test_a_tensor_that_is_not_finite_is_exit_code_1(self, loragen, run, tmp_path):
        copy = damaged(run, tmp_path)
        result = loragen("ckpt", "analyze", copy)
        assert result.exit_code == 1
        assert "NaN or infinity: \n  checkpoint-step-006.ckpt: base_model.model" in result.stdout
        result = loragen("ckpt", "analyze", copy, "--json")
        assert result.exit_code == 1
        (report,) = json.loads(result.stdout)["collections"]  # NaN is no JSON
        assert len(report["not_finite"]) == 1
        assert report["drift"][1]["norm_delta"] is None
        assert len(report["sample"]["checkpoints"]) == 3  # the others are still compared

    def test_the_page_is_written_beside_the_answer(self, loragen, run):
        result = loragen("ckpt", "analyze", run / "adapter", "--html", "out/page.html", "--json")
        assert result.exit_code == 0, result.output
        json.loads(result.stdout)
        assert result.stderr == "wrote out/page.html\n"
        assert (
            (loragen.work / "out" / "page.html").read_text(encoding="utf-8").startswith("<!doctype")
        )

    def test_a_page_needs_plotly(self, fails, run, monkeypatch):
        monkeypatch.setattr("loragen.core.page.find_spec", lambda _: None)
        said = fails(2, "ckpt", "analyze", run, "--html", "page.html")
        assert said.startswith("--html needs plotly; pip install ")

    def test_a_page_is_replaced_only_with_force(self, fails, run):
        page = fails.loragen.work / "page.html"
        analyze = ("ckpt", "analyze", run / "adapter", "--html", "page.html")
        assert fails.loragen(*analyze).exit_code == 0
        error = fails(2, *analyze)
        assert error.startswith("page.html exists")
        assert "--force" in error
        forced = fails.loragen(*analyze, "--force")
        assert forced.exit_code == 0, forced.output
        page.write_text("mine", encoding="utf-8")
        assert "does not replace it" in fails(2, *analyze, "--force")
        assert "is a directory" in fails(2, "ckpt", "analyze", run, "--html", ".", "--force")

    @pytest.mark.parametrize("json_flag", [(), ("--json",)])
    def test_nothing_there_is_a_usage_error(self, fails, json_flag):
        error = fails(2, "ckpt", "analyze", "none", *json_flag)
        assert error.startswith("none: no checkpoints")
        (fails.loragen.work / "empty").mkdir()
        error = fails(2, "ckpt", "analyze", "empty", *json_flag)
        assert error.startswith("empty: no checkpoints")

    def test_a_broken_file_is_one_line(self, fails):
        (fails.loragen.work / "x.ckpt").write_bytes(b"broken")
        assert fails(1, "ckpt", "analyze", "x.ckpt").startswith("x.ckpt: ")


class TestTokens:
    def test_the_layout_of_a_runs_newest_checkpoint(self, loragen, run):
        result = loragen("ckpt", "test", run, "--token-dim", "16")
        assert result.exit_code == 0, result.output
        assert "checkpoint-step-008.ckpt" in result.stdout
        assert "self_attn.q_proj" in result.stdout
        assert "1,856 values in 28 tensors" in result.stdout
        assert "116 tokens of 16, 100.0% filled" in result.stdout
        assert "round trip: exact, bit for bit (0 values changed, largest error 0)" in result.stdout

    def test_the_original_spelling_as_json(self, loragen, run):
        file = run / "checkpoints" / "checkpoint-step-005.ckpt"
        sizes = ("--max_tokens", "512", "--token_dim", "16")
        result = loragen("ckpt", "test", "--checkpoint_file", file, *sizes, "--json")
        assert result.exit_code == 0, result.output
        report = json.loads(result.stdout)
        assert report["file"] == str(file)
        assert (report["tokens"], report["max_tokens"], report["fits"]) == (116, 512, True)
        assert sum(kind["tensors"] * kind["tokens_each"] for kind in report["kinds"]) == 116
        assert (report["bits_changed"], report["largest_error"]) == (0, 0.0)

    def test_too_few_tokens_name_the_size_that_fits(self, loragen, run):
        given = ("ckpt", "test", run / "adapter", "--token-dim", "16")
        result = loragen(*given, "--max-tokens", "115")
        assert result.exit_code == 1
        assert "116 tokens of 16" in result.stdout  # shown all the same
        assert "--max-tokens 115" in result.stderr
        assert "give 116 or auto" in result.stderr
        assert json.loads(loragen(*given, "--max-tokens", "115", "--json").stdout)["fits"] is False
        assert loragen(*given, "--max-tokens", "116").exit_code == 0

    @pytest.mark.parametrize("most", ["0", "-1", "many", "1.5"])
    def test_max_tokens_is_a_count_or_auto(self, fails, run, most):
        error = fails(2, "ckpt", "test", run, "--max-tokens", most)
        assert error.startswith("--max-tokens: ")
        assert f"got {most}" in error

    def test_it_needs_exactly_one_file(self, fails, run):
        assert "ckpt test FILE" in fails(2, "ckpt", "test")
        assert "ckpt test FILE" in fails(2, "ckpt", "test", run, "--checkpoint-file", run)
        assert fails(2, "ckpt", "test", "none").startswith("none: no such")


class TestLines:
    def test_the_rows_of_a_checkpoint(self, loragen, run, file):
        path = run / "checkpoints" / "checkpoint-step-006.ckpt"
        result = loragen("ckpt", "lines", path, "--json")
        assert result.exit_code == 0, result.output
        document = json.loads(result.stdout)
        assert document["file"] == str(file)
        assert (document["step"], document["stage"]) == (6, 2)
        assert document["learning_rate"] == 1e-3
        lines = [row["line"] for row in document["rows"]]
        assert lines == [index + 1 for index in batch_indices(16, 4, 42, 5)]
        assert [row["prompt"] for row in document["rows"]] == [
            f"Question {line - 1} about red?" for line in lines
        ]
        assert {len(row["hash"]) for row in document["rows"]} == {16}

    def test_any_step_of_a_run_kept_or_not(self, loragen, run):
        result = loragen("ckpt", "lines", run, "--step", 2)
        assert result.exit_code == 0, result.output
        head, rows = result.stdout.split("\n\n")
        assert head.splitlines()[1] == "step 2, stage 1, learning rate 0.01"
        numbers = [int(line.split()[0]) for line in rows.splitlines()[1:]]
        assert numbers == [index + 1 for index in batch_indices(16, 4, 42, 1)]

    def test_last_ckpt_knows_its_step(self, loragen, run, tmp_path):
        copy = shutil.copytree(run, tmp_path / "copy")
        folder = copy / "checkpoints"
        shutil.copy(folder / "checkpoint-step-007.ckpt", folder / "last.ckpt")
        result = loragen("ckpt", "lines", folder / "last.ckpt", "--json")
        assert json.loads(result.stdout)["step"] == 7

    def test_a_long_prompt_is_cut_to_one_line(self, loragen, train_lora, dataset):
        file = dataset([{"prompt": "many\nlines " * 30, "response": "red"}])
        run = train_lora({"data.max_length": 400}, file=file).directory
        document = json.loads(loragen("ckpt", "lines", run, "--step", 1, "--json").stdout)
        (prompt,) = {row["prompt"] for row in document["rows"]}
        assert len(prompt) == 60
        assert prompt.startswith("many lines many")
        assert "…" in prompt

    @pytest.mark.parametrize(
        "part, more, message",
        [
            ("", (), "--step N"),
            ("adapter", (), "--step N"),
            ("", ("--step", 9), "no step 9"),
            ("checkpoints/checkpoint-step-003.ckpt", (), "checkpoint-step-003.ckpt: no such"),
        ],
    )
    def test_a_step_that_is_not_there_is_a_usage_error(self, fails, run, part, more, message):
        assert message in fails(2, "ckpt", "lines", run / part, *more)

    def test_steps_that_a_stopped_run_did_not_do_are_not_claimed(self, fails, stopped):
        error = fails(2, "ckpt", "lines", stopped, "--step", 7)
        assert error.startswith(f"{stopped}: no step 7")

    def test_a_checkpoint_outside_a_run_is_a_usage_error(self, fails, run):
        shutil.copy(run / "checkpoints" / "checkpoint-step-006.ckpt", fails.loragen.work / "x.ckpt")
        assert fails(2, "ckpt", "lines", "x.ckpt").startswith("x.ckpt: ")


class TestConvert:
    def test_the_converted_run_trains_a_generator(
        self, loragen, legacy_run, collection, gen_config, tmp_path
    ):
        source = legacy_run("full")
        result = loragen("ckpt", "convert", source, "--data-root", collection.data)
        assert result.exit_code == 0, result.output
        assert result.stdout == "runs/colors_lora_20250720_143052\n"
        assert "[1/1] " in result.stderr
        assert "4 checkpoints, steps 5 to 8\n  rank 2, alpha 4, base " in result.stderr
        assert "0 of 4" in result.stderr
        analysis = json.loads(loragen("ckpt", "analyze", result.stdout.strip(), "--json").stdout)
        (report,) = analysis["collections"]
        assert (report["checkpoints"], report["values"], report["scaling"]) == (4, 1856, 2.0)

        from loragen.core.learning.train import train
        from loragen.core.progress import Silent

        run = {"run": str(loragen.work / result.stdout.strip())}
        other = {"run": str(collection.runs["animals"])}
        trained = train(gen_config({"sources": [run, other], "training.max_epochs": 1}), Silent())
        assert trained.manifest.status == "success"

    def test_the_converted_run_can_be_evaluated(self, loragen, legacy_run, collection):
        run = loragen("ckpt", "convert", legacy_run()).stdout.strip()
        result = loragen("lora", "eval", "--adapter", run, "--dataset", collection.file("colors"))
        assert result.exit_code == 0, result.output

    def test_without_its_dataset_gen_train_asks_for_prompts(self, loragen, legacy_run):
        result = loragen("ckpt", "convert", legacy_run(), "--output", "runs")
        assert result.exit_code == 0, result.output
        assert "dataset colors: " in result.stderr
        result = loragen("gen", "train", "--checkpoint-dir", "runs", "--dry-run")
        assert result.exit_code == 2
        assert "give the prompts" in result.stderr

    def test_one_run_that_fails_stops_no_other(self, loragen, legacy_run, tmp_path):
        legacy_run(dataset="animals")
        bad = legacy_run(dataset="colors")
        (bad / "checkpoints" / "step_006.pt").write_bytes(b"broken")
        result = loragen("ckpt", "convert", tmp_path / "experiments", "--json")
        assert result.exit_code == 1
        good, failed = json.loads(result.stdout)
        assert good["steps"] == [5, 6, 7, 8]
        assert good["error"] is None
        assert (failed["source"], failed["run"]) == (str(bad), None)
        assert "step_006.pt: " in failed["error"][0]
        assert f"1 of 2 runs were not converted:\n  {bad}\n" in result.stderr
        assert [run.name for run in (loragen.work / "runs").iterdir()] == [
            "animals_lora_20250720_143052"
        ]
        result = loragen("ckpt", "convert", tmp_path / "experiments", "--skip-bad")
        assert result.exit_code == 0, result.output
        assert "converted before, to runs/animals_lora_20250720_143052" in result.stderr
        assert "left out: " in result.stderr
        assert len(result.stdout.splitlines()) == 2

    def test_what_is_not_recorded_has_to_be_given(self, fails, legacy_run, tmp_path):
        source = legacy_run(yaml=False)
        alpha, base = fails(2, "ckpt", "convert", source, "--json", lines=2)
        assert "--alpha" in alpha
        assert "--base-model" in base
        config = tmp_path / "given.yaml"
        config.write_text("base_model: somewhere/else\nlora_alpha: 4\n", encoding="utf-8")
        result = fails.loragen("ckpt", "convert", source, "--config", config, "--json")
        (document,) = json.loads(result.stdout)
        assert (document["base_model"], document["optimizer_states"]) == ("somewhere/else", 4)
        unknown = {"name": "colors", "path": "", "sha256": "", "rows": 0}
        assert document["dataset"].items() >= unknown.items()

    def test_a_bare_folder_needs_its_dataset(self, fails, legacy_run, dataset, tmp_path):
        bare = tmp_path / "bare"
        shutil.copytree(legacy_run("safetensors") / "checkpoints", bare)
        given = ("--alpha", 4, "--base-model", "somewhere/else")
        assert "--dataset" in fails(2, "ckpt", "convert", bare, *given)
        file = dataset(name="mine.jsonl")
        result = fails.loragen("ckpt", "convert", bare, *given, "--dataset", file, "--json")
        (document,) = json.loads(result.stdout)
        assert document["dataset"]["name"] == "mine"
        assert document["dataset"]["rows"] == 12

    def test_the_output_is_a_directory(self, fails, legacy_run):
        source = legacy_run()
        (fails.loragen.work / "taken").touch()
        error = fails(2, "ckpt", "convert", source, "--output", "taken/runs")
        assert error.startswith("taken is a file")

    @pytest.mark.parametrize("alpha", ["0", "-1", "nan", "inf"])
    def test_alpha_is_above_zero(self, fails, legacy_run, alpha):
        error = fails(2, "ckpt", "convert", legacy_run(), "--alpha", alpha)
        assert error.startswith("--alpha: ")
        assert f"got {alpha}" in error

    def test_nothing_there(self, fails):
        assert fails(2, "ckpt", "convert", "none").startswith("none: no such file")
        assert fails(2, "ckpt", "convert", ".").startswith(".: no checkpoints")
