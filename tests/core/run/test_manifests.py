import json

import pytest

from loragen.core.errors import DataError, PluginError, UsageError
from loragen.core.run.directory import (
    DatasetRecord,
    GeneratorManifest,
    LoraManifest,
    plugin_records,
    read_manifest,
    write_manifest,
)


@pytest.fixture
def manifest():
    return LoraManifest(
        base_model="demo",
        dataset=DatasetRecord(name="arc", path="/data/arc.jsonl", sha256="0" * 64, rows=3),
        adapter_config={"r": 8, "target_modules": ["q_proj"]},
        seed=42,
        max_steps=125,
        steps=[76, 77],
        plugins=plugin_records({"schedule": ["two-stage"], "logger": ["swanlab"]}),
        logger_run_ids={"swanlab": "abc"},
    )


def test_a_manifest_comes_back_equal(tmp_path, manifest):
    write_manifest(tmp_path, manifest)
    assert read_manifest(tmp_path, LoraManifest) == manifest
    write_manifest(tmp_path, manifest.model_copy(update={"status": "success", "seconds": 1.5}))
    assert read_manifest(tmp_path, LoraManifest).status == "success"


def test_a_manifest_says_which_code_took_part(manifest):
    found = {(record.kind, record.name, record.distribution) for record in manifest.plugins}
    assert found == {("schedule", "two-stage", "loragen"), ("logger", "swanlab", "loragen")}
    with pytest.raises(PluginError, match="unknown schedule 'none'"):
        plugin_records({"schedule": ["none"]})


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"format_version": 2}, "format 2 is newer than this loragen reads"),
        ({"kind": "generator"}, "is a run of gen train, not of lora train"),
        ({"dataset": None}, "not the manifest of a lora run"),
    ],
)
def test_what_is_not_our_manifest_is_refused(tmp_path, manifest, change, reason):
    document = {**manifest.model_dump(mode="json"), **change}
    (tmp_path / "manifest.json").write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(DataError, match=reason) as error:
        read_manifest(tmp_path, LoraManifest)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "null"])
def test_a_broken_manifest_is_one_line(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=r"manifest\.json: not the manifest") as error:
        read_manifest(tmp_path, GeneratorManifest)
    assert "\n" not in str(error.value)


def test_no_manifest_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match="not a run directory"):
        read_manifest(tmp_path, LoraManifest)
