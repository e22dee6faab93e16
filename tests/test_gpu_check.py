"""The GPU check writes its JSON file whatever its parts do; tried without a GPU."""

import json
import os
import subprocess
import sys

from tests.conftest import ROOT

SCRIPT = ROOT / "benchmarks" / "gpu_check.py"


def checked(tmp_path, *options):
    """Runs the script without a GPU; returns its exit code, stdout and the JSON file's parts."""
    output = tmp_path / "check.json"
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--tiny", *options, "--output", str(output)],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        text=True,
    )
    return done.returncode, done.stdout, json.loads(output.read_text(encoding="utf-8"))["parts"]


def test_the_tiny_mode_writes_what_each_part_finds(tmp_path):
    options = ("--device", "cpu", "--parts", "environment", "packing", "generation", "four bits")
    code, told, parts = checked(tmp_path, *options)
    assert code == 0, told
    assert parts["environment"]["parameters"] > 600_000
    in_float32 = parts["packing"]["float32"]
    assert in_float32["decision"] == "packed"
    assert in_float32["packed_and_padded"] < 1e-4
    assert parts["packing"]["bfloat16"]["packed_and_padded_in_float32"] < 1e-4
    assert parts["generation"]["why"] == "no generator was trained above"
    assert parts["four bits"]["status"] == "skipped"
    assert in_float32["attention"] == "sdpa"
    assert "0 of 4 parts failed" in told


def test_a_part_that_fails_is_recorded_and_the_next_one_runs(tmp_path):
    missing = str(tmp_path / "missing")
    options = ("--device", "cpu", "--base", missing, "--parts", "packing", "four bits")
    code, told, parts = checked(tmp_path, *options)
    assert code == 1
    assert parts["packing"]["status"] == "failed"
    assert missing in parts["packing"]["error"]
    assert parts["four bits"]["status"] == "skipped"
    assert "1 of 2 parts failed ['packing']" in told


def test_without_a_gpu_nothing_is_claimed(tmp_path):
    code, _, parts = checked(tmp_path, "--parts", "environment", "lora")
    assert code == 1
    assert "finds no GPU" in parts["environment"]["error"]
    assert parts["lora"] == {"status": "skipped", "why": "see environment"}
