"""A factory of small base models whose tokenizers, chat templates and files are odd, as those of
real models are. Every base is the demo's with a few files changed, so that it trains in seconds."""

import json
import shutil
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""A template whose turns end with a token of their own."""
CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")


def write_base(
    directory: Path,
    *,
    template: str | None = "",
    added: Sequence[str] = (),
    adds: Mapping[str, str] | None = None,
    tokenizer: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
    vocabulary: int | None = None,
) -> Path:
    """Writes a base model and returns its directory.

    `template` replaces the chat template (None: there is none); a template with the tokens of
    `CHATML` gets them. `added` are further special tokens, `adds` the tokens that the tokenizer
    puts at the `start` or `end` of every text by itself. `tokenizer` and `config` are keys of
    tokenizer_config.json and config.json. `vocabulary` is the number of rows of the embedding; by
    default there is one for every token.
    """
    shutil.copytree(str(files("loragen").joinpath("demo", "base")), directory)
    if template is None:
        (directory / "chat_template.jinja").unlink()
    elif template:
        (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
        added = [*(one for one in CHATML_TOKENS if one in template), *added]
    tokens = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
    known = len(tokens["model"]["vocab"])
    for number, text in enumerate(added):
        entry = {**tokens["added_tokens"][0], "id": known + number, "content": text}
        tokens["added_tokens"].append(entry)
    if adds:
        ids = {one["content"]: one["id"] for one in tokens["added_tokens"]}
        pieces = {
            place: [{"SpecialToken": {"id": adds[place], "type_id": 0}}] if place in adds else []
            for place in ("start", "end")
        }
        own = [{"Sequence": {"id": "A", "type_id": 0}}]
        tokens["post_processor"]["single"] = [*pieces["start"], *own, *pieces["end"]]
        tokens["post_processor"]["special_tokens"] = {
            one: {"id": one, "ids": [ids[one]], "tokens": [one]} for one in adds.values()
        }
    _write(directory / "tokenizer.json", tokens)
    _change(directory / "tokenizer_config.json", tokenizer or {})
    _change(directory / "config.json", config or {})
    rows = vocabulary or known + len(added)
    if rows != known:
        _resize(directory, rows)
    return directory


def _resize(directory: Path, rows: int) -> None:
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=False)
    model.resize_token_embeddings(rows, mean_resizing=False)
    model.save_pretrained(directory)


def _change(file: Path, keys: Mapping[str, Any]) -> None:
    _write(file, {**json.loads(file.read_text(encoding="utf-8")), **keys})


def _write(file: Path, document: Any) -> None:
    file.write_text(json.dumps(document, ensure_ascii=False), encoding="utf-8")
