"""Rows written in every format and every kind of file."""

import csv
import json


def prompt_response(row, prompt="prompt", response="response"):
    document = {prompt: row.prompt, response: row.response, "system": row.system}
    if row.history:
        document["history"] = [list(turn) for turn in row.history]
    if row.choices:
        document["choices"] = row.choices
    return document


def instruction(row):
    """The prompt is cut at its first empty line, where there is something on both sides."""
    first, _, rest = row.prompt.partition("\n\n")
    parts = (first, rest) if first and rest else (row.prompt, "")
    document = prompt_response(row, "instruction", "output")
    return document | {"instruction": parts[0], "input": parts[1]}


def messages(row, role="role", content="content", user="user", assistant="assistant"):
    said = [("system", row.system)] if row.system else []
    for turn in (*row.history, row):
        said += [(user, turn.prompt), (assistant, turn.response)]
    return [{role: name, content: text} for name, text in said]


FORMATS = {
    "prompt/response": prompt_response,
    "prompt/completion": lambda row: prompt_response(row, "prompt", "completion"),
    "query/response": lambda row: prompt_response(row, "query", "response"),
    "instruction/output[/input]": instruction,
    "messages": lambda row: {"messages": messages(row)},
    "conversations": lambda row: {
        "conversations": messages(row, "from", "value", "human", "gpt"),
    },
}
NO_CHOICES = {"messages", "conversations"}  # these have no place for them


def jsonl(file, documents):
    lines = [json.dumps(document, ensure_ascii=False) for document in documents]
    file.write_text("\n".join(lines), encoding="utf-8", newline="\n")


def json_list(file, documents):
    file.write_text(json.dumps(documents, indent=1), encoding="utf-8")


def csv_table(file, documents):
    keys = list(dict.fromkeys(key for document in documents for key in document))
    with file.open("w", encoding="utf-8", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(keys)
        writer.writerows([_cell(document.get(key)) for key in keys] for document in documents)


def parquet(file, documents):
    import pyarrow as pa
    from pyarrow.parquet import write_table

    keys = dict.fromkeys(key for document in documents for key in document)
    columns = {key: [document.get(key) for document in documents] for key in keys}
    write_table(pa.table(columns), file)


FILES = {".jsonl": jsonl, ".json": json_list, ".csv": csv_table, ".parquet": parquet}


def _cell(value):
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
