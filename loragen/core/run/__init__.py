"""A run directory: its files, by whom it is written, and what its training has logged.

The names of its files are here, so that a listing of runs needs nothing heavier.
"""

from pathlib import Path

MANIFEST = "manifest.json"
CONFIG = "config.yaml"
CHECKPOINTS = "checkpoints"
CHECKPOINT_SUFFIX = ".ckpt"
LAST_CHECKPOINT = Path("checkpoints/last.ckpt")
"""The checkpoint from which a killed run resumes; it is not one of the collected ones."""
BEST_CHECKPOINT = f"epoch=*{CHECKPOINT_SUFFIX}"
"""Glob for a generator's best checkpoint; at most one exists (two during replacement)."""
GENERATOR_FILE = Path("results/final_model/generator_model.pt")
COMMANDS = {"lora": "lora train", "generator": "gen train"}
"""The command that makes the runs of each kind of manifest."""
FORMAT_VERSION = 1
"""The newest format of a manifest that is known."""
