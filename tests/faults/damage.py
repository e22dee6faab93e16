"""Damaged copies of valid files, for the tests of whatever reads files."""

import io
import json
import struct
import zipfile
from contextlib import suppress
from pathlib import Path

import yaml
from hypothesis import strategies as st


def cut(file: Path, share: float = 0.5) -> Path:
    """Cuts a file to a share of its bytes, as a full disk or a broken transfer does."""
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * share)])
    return file


def flip(file: Path, at: float = 0.5) -> Path:
    """Flips one bit of the byte that lies at a share of a file, as a failing disk does."""
    content = bytearray(file.read_bytes())
    content[int((len(content) - 1) * at)] ^= 0x10
    file.write_bytes(content)
    return file


# ---------------------------------------------------------------------------- at random

VALUES = [
    None,
    *(True, False, 0, 1, -1, 7, 2**31, 2**63, 10**30, 0.5, -0.5, 1e-320, 1e308),
    *(float("nan"), float("inf"), -float("inf")),
    *("", " ", "x", "1", "null", "~", "nowhere/x", "../x", ".", "a\nb", "a\rb", "\x1b[31m"),
    *("\0", "\ud800", "天空", "ﷺ", "%s{0}{{ x }}", "hub:a/b", "demo", "auto", "x" * 3000),
    *([], {}, [None], [[]], [1, 2], ["x"], {"": None}, {"x": {"x": {"x": []}}}, [[1], "x", None]),
]
"""What may stand at any place of a document."""
TEXTS = [
    *("\n", "\r", "\0", "\ufeff", "\u2028", '"', "'", "\\", ",", ";", ":", "{", "}", "[", "]", "#"),
    *("\t", "&a ", "*a", "!!python/object:os.system x", "|", "- ", "---\n", "null", "NaN", "1e999"),
    *("0x1F", "010", "\\ud800", "{" * 3000, "[" * 3000, "天", "é", "x" * 3000, "<!-- ", "-1", "/"),
]
"""What may stand between any two characters of a text."""
STATEMENTS = [
    *("{{ ", " }}", "{% endfor %}", "{% if x %}", "{{ x.y.z }}", "{{ messages[9]['content'] }}"),
    *(
        "{{ 1 / 0 }}",
        "{{ raise_exception('no') }}",
        "{{ messages }}",
        "{% break %}",
        "{{ 'a' + 1 }}",
    ),
    *("{% for i in range(10**9) %}{% endfor %}", "{% for i in range(99999) %}x{% endfor %}"),
    *("{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "{% include 'x' %}", "{{ self.x() }}"),
    *("{{ ''.__class__ }}", "{% set messages = none %}", "{{ '<|endoftext|>' }}", "{{ tools[0] }}"),
    *("{{ strftime_now('%Y') }}", "{{ 'x' * 2000000 }}", "{{ messages | tojson(9) }}", "{#"),
]
"""What may stand in a chat template."""


@st.composite
def damaged(draw, name: str, content: bytes) -> bytes:
    """A valid file with one to three things changed in it, or random bytes in its place; `name`
    says by its suffix which changes leave the file readable."""
    kinds = [_bytes, *_KINDS.get(Path(name).suffix, (_bytes,)) * 2]
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 3]))):
        with suppress(_NotPossibleError):
            content = draw(st.sampled_from(kinds))(draw, content)
    return content


class _NotPossibleError(Exception):
    """An earlier change has left nothing that can be changed in this way."""


def _place(draw, size):
    return draw(st.integers(0, max(0, size)))


def _bytes(draw, content):
    how = draw(st.integers(0, 8))
    if how == 0:
        return draw(st.binary(max_size=300))
    start = _place(draw, len(content))
    end = min(len(content), start + draw(st.sampled_from([1, 1, 4, 30, 1000])))
    replaced = {
        1: b"",
        2: content[start:end] * 2,
        3: bytes(end - start),
        4: b"\xff" * (end - start),
        5: draw(st.binary(max_size=30)),
        6: bytes(byte ^ 0x10 for byte in content[start:end]),
    }
    if how in replaced:
        return content[:start] + replaced[how] + content[end:]
    return content[:start] if how == 7 else content[start:]


def _text(draw, content, pieces=TEXTS):
    text = content.decode(errors="replace")
    start = _place(draw, len(text))
    end = min(len(text), start + draw(st.sampled_from([0, 0, 1, 10])))
    piece = draw(st.sampled_from(pieces))
    return f"{text[:start]}{piece}{text[end:]}".encode(errors="replace")


def _template(draw, content):
    return _text(draw, content, STATEMENTS)


def _lines(draw, content):
    lines = content.splitlines(keepends=True)
    if not lines:
        raise _NotPossibleError
    one, other = (_place(draw, len(lines) - 1) for _ in range(2))
    lines[one] = [b"", lines[one] * 2, lines[other], lines[one].rstrip(b"\n")][_place(draw, 3)]
    return b"".join(lines)


def _places(document, found=()):
    """The paths to all values of a document."""
    yield found
    if isinstance(document, dict):
        for key, value in document.items():
            yield from _places(value, (*found, key))
    elif isinstance(document, list | tuple):
        for index, value in enumerate(document[:50]):
            yield from _places(value, (*found, index))


def _changed(draw, document):
    """A document with one value replaced, left out, wrapped, or under another key."""
    places = list(_places(document))
    place = places[_place(draw, len(places) - 1)]
    value = draw(st.sampled_from(VALUES))
    how = draw(st.sampled_from(["replace", "replace", "replace", "leave out", "wrap", "rename"]))

    def change(node, rest):
        if rest:
            key, *more = rest
            if isinstance(node, dict):
                if not more and how == "leave out":
                    return {k: v for k, v in node.items() if k != key}
                if not more and how == "rename":
                    return {f"{k}x" if k == key else k: v for k, v in node.items()}
                return {k: change(v, more) if k == key else v for k, v in node.items()}
            kept = [change(v, more) if i == key else v for i, v in enumerate(node)]
            return kept[:key] + kept[key + 1 :] if not more and how == "leave out" else kept
        return [node] if how == "wrap" else value

    return change(document, list(place))


def _json(draw, content):
    try:
        return json.dumps(_changed(draw, json.loads(content))).encode()
    except (ValueError, RecursionError):
        raise _NotPossibleError from None


def _json_line(draw, content):
    lines = content.splitlines()
    if not lines:
        raise _NotPossibleError
    at = _place(draw, len(lines) - 1)
    lines[at] = _json(draw, lines[at])
    return b"\n".join(lines) + b"\n"


def _yaml(draw, content):
    try:
        return yaml.safe_dump(_changed(draw, yaml.safe_load(content))).encode(errors="replace")
    except (yaml.YAMLError, ValueError, TypeError, RecursionError):
        raise _NotPossibleError from None


def _header(draw, content):
    """Changes the header of a safetensors file, whose values stay in place."""
    try:
        (length,) = struct.unpack("<Q", content[:8])
        header = json.dumps(_changed(draw, json.loads(content[8 : 8 + length]))).encode()
    except (ValueError, struct.error, RecursionError):
        raise _NotPossibleError from None
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header + content[8 + length :]


def _tensor(draw, tensor):
    import torch

    changes = [
        lambda t: t * float("nan"),
        lambda t: t * 0,
        lambda t: t * 1e30,
        lambda t: t.T if t.dim() == 2 else t[None],
        lambda t: t[:0],
        lambda t: t.reshape(-1),
        lambda t: torch.cat([t, t]) if t.dim() else t[None],
        lambda t: t.to(torch.float64),
        lambda t: t.to(torch.int64),
        lambda t: t.to(torch.complex64),
        lambda t: t.to(torch.bool),
        lambda t: t.to("meta"),
        lambda t: t.to_sparse() if t.dim() else t,
    ]
    return changes[_place(draw, len(changes) - 1)](tensor.detach())


def _tensors(draw, content):
    """Changes one tensor of a safetensors file."""
    from safetensors import SafetensorError
    from safetensors.torch import load, save

    try:
        tensors = load(content)
        if not tensors:
            raise _NotPossibleError
        (length,) = struct.unpack("<Q", content[:8])
        metadata = json.loads(content[8 : 8 + length]).get("__metadata__")
        key = sorted(tensors)[_place(draw, len(tensors) - 1)]
        tensors[key] = _tensor(draw, tensors[key])
        return save({key: one.contiguous() for key, one in tensors.items()}, metadata)
    except (SafetensorError, ValueError, RuntimeError, NotImplementedError, AttributeError):
        raise _NotPossibleError from None


def _torch(draw, content):
    """Changes one value of a file of torch.save."""
    import torch

    try:
        document = torch.load(io.BytesIO(content), weights_only=True)
        places = [place for place in _places(document) if place]
        if draw(st.booleans()):
            changed = _changed(draw, document)
        else:
            place = places[_place(draw, len(places) - 1)]
            holder = document
            for key in place[:-1]:
                holder = holder[key]
            if isinstance(holder[place[-1]], torch.Tensor):
                holder[place[-1]] = _tensor(draw, holder[place[-1]])
            changed = document
        saved = io.BytesIO()
        torch.save(changed, saved)
        return saved.getvalue()
    except Exception:  # noqa: BLE001  # whatever an earlier change has made of it
        raise _NotPossibleError from None


def _archive(draw, content):
    """Changes the bytes of one member of a ZIP archive, whose checksums then agree."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            members = {one.filename: archive.read(one) for one in archive.infolist()}
        name = sorted(members)[_place(draw, len(members) - 1)]
        members[name] = _bytes(draw, members[name])
        saved = io.BytesIO()
        with zipfile.ZipFile(saved, "w") as archive:
            for member, data in members.items():
                archive.writestr(member, data)
        return saved.getvalue()
    except (zipfile.BadZipFile, IndexError, EOFError, OSError, NotImplementedError, ValueError):
        raise _NotPossibleError from None


_KINDS = {
    ".json": (_json, _json, _json, _text),
    ".jsonl": (_json_line, _json_line, _lines, _text),
    ".csv": (_text, _lines),
    ".txt": (_text, _lines),
    ".md": (_text, _lines),
    ".jinja": (_template, _template, _text),
    ".yaml": (_yaml, _yaml, _yaml, _text, _lines),
    ".safetensors": (_header, _tensors, _tensors),
    ".ckpt": (_torch, _torch, _archive),
    ".pt": (_torch, _torch, _archive),
}
"""{suffix: the changes that suit such a file, beside those of bytes}"""
