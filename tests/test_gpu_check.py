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


def test_the_tiny_mode_writes_what_each_part_finds_and_which_fails(tmp_path):
    missing = str(tmp_path / "missing")
    options = ("--device", "cpu", "--encoder", missing, "--minutes", "40", "--parts", "packing")
    code, told, parts = checked(tmp_path, *options, "generation", "encoder", "four bits")
    in_float32, in_bfloat16 = parts["packing"]["float32"], parts["packing"]["bfloat16"]
    assert in_float32["decision"] == in_bfloat16["decision"] == "packed"
    assert in_float32["packed_and_padded"] < 1e-4
    assert in_bfloat16["packed_and_padded_in_float32"] < 1e-4
    assert parts["generation"]["why"] == "no generator was trained above"
    assert parts["encoder"]["status"] == "failed"
    assert missing in parts["encoder"]["error"]
    assert parts["four bits"]["status"] == "skipped"  # by a new process
    assert code == 1
    assert "1 of 4 parts failed ['encoder']" in told


def test_without_a_gpu_nothing_is_claimed(tmp_path):
    code, _, parts = checked(tmp_path, "--parts", "environment", "lora")
    assert code == 1
    assert "finds no GPU" in parts["environment"]["error"]
    assert parts["lora"] == {"status": "skipped", "why": "see environment"}
