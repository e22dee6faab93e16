import hashlib
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loragen.core import files
from loragen.core.files import (
    file_name,
    natural_key,
    sha256,
    sha256_text,
    user_path,
    write_json,
    write_text,
    written_atomically,
)


def contents(directory):
    return {p.relative_to(directory).as_posix() for p in directory.rglob("*")}


def test_a_home_that_nobody_has_is_no_home():
    assert user_path("~") == Path.home()
    assert user_path("~no-such-user/x") == Path("~no-such-user/x")


def test_a_file_appears_with_its_parents(tmp_path):
    write_text(tmp_path / "a" / "b" / "c.txt", "ä\n")
    assert (tmp_path / "a/b/c.txt").read_bytes() == "ä\n".encode()
    assert contents(tmp_path) == {"a", "a/b", "a/b/c.txt"}


def test_nothing_is_there_until_the_block_has_ended(tmp_path):
    with written_atomically(tmp_path / "f") as temporary:
        temporary.write_text("half", encoding="utf-8")
        assert not (tmp_path / "f").exists()
    assert (tmp_path / "f").read_text(encoding="utf-8") == "half"


@pytest.mark.parametrize("old", [None, "file", "directory"])
@pytest.mark.parametrize("new", ["file", "directory", "nothing yet"])
def test_an_error_leaves_what_was_there_and_nothing_else(tmp_path, old, new):
    target = tmp_path / "target"
    if old == "file":
        target.write_text("old", encoding="utf-8")
    elif old == "directory":
        target.mkdir()
        (target / "old").touch()
    before = contents(tmp_path)
    with pytest.raises(KeyboardInterrupt), written_atomically(target) as temporary:
        if new == "file":
            temporary.write_text("new", encoding="utf-8")
        elif new == "directory":
            temporary.mkdir()
            (temporary / "new").touch()
        raise KeyboardInterrupt
    assert contents(tmp_path) == before


def test_a_file_is_replaced(tmp_path):
    write_text(tmp_path / "f", "old")
    write_text(tmp_path / "f", "new")
    assert (tmp_path / "f").read_text(encoding="utf-8") == "new"
    assert contents(tmp_path) == {"f"}


def test_a_directory_is_replaced_whole(tmp_path):
    for name in ("old", "new"):
        with written_atomically(tmp_path / "d") as temporary:
            temporary.mkdir()
            (temporary / name).touch()
    assert contents(tmp_path) == {"d", "d/new"}


@pytest.mark.parametrize("comes_back", [True, False])
@pytest.mark.parametrize("name", ["d", "replaced"])
def test_a_directory_that_cannot_be_replaced_is_not_lost(tmp_path, monkeypatch, name, comes_back):
    """On Windows a renaming fails while a scanner has a file open; perhaps the second one too."""

    def refused(*_):
        raise PermissionError("a scanner holds a file")

    (tmp_path / name).mkdir()
    (tmp_path / name / "old").touch()
    with pytest.raises(PermissionError), written_atomically(tmp_path / name) as temporary:
        temporary.mkdir()
        monkeypatch.setattr(Path, "replace", refused)
        if not comes_back:
            rename = Path.rename
            monkeypatch.setattr(
                Path, "rename", lambda p, to: refused() if to == tmp_path / name else rename(p, to)
            )
    if comes_back:
        assert contents(tmp_path) == {name, f"{name}/old"}
    else:
        assert len(list(tmp_path.rglob("old"))) == 1


@pytest.mark.parametrize("old", ["file", "directory"])
def test_a_file_that_another_program_holds_for_a_moment_is_replaced(tmp_path, monkeypatch, old):
    """As a virus scanner does on Windows."""
    monkeypatch.setattr(files, "HELD_SECONDS", 5.0)
    held, replace = [1, 2], Path.replace

    def scanned(path, target):
        if held:
            held.pop()
            raise PermissionError("a scanner holds a file")
        return replace(path, target)

    target = tmp_path / "target"
    target.mkdir() if old == "directory" else target.touch()
    monkeypatch.setattr(Path, "replace", scanned)
    write_text(target, "new")
    assert target.read_text(encoding="utf-8") == "new"
    assert not held


def test_text_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(files.os, "fsync", lambda _: synced.append((tmp_path / "f").exists()))
    write_text(tmp_path / "f", "new\n")
    assert synced == [False]
    assert (tmp_path / "f").read_bytes() == b"new\n"


def test_json_is_readable_text(tmp_path):
    write_json(tmp_path / "x.json", {"größe": [1, 2.5, None]})
    text = (tmp_path / "x.json").read_text(encoding="utf-8")
    assert json.loads(text) == {"größe": [1, 2.5, None]}
    assert "größe" in text
    assert text.endswith("}\n")


def test_the_hash_of_a_file_is_that_of_its_bytes(tmp_path):
    (tmp_path / "f").write_bytes(b"x" * 3_000_000)
    assert sha256(tmp_path / "f") == hashlib.sha256(b"x" * 3_000_000).hexdigest()


@given(st.lists(st.text()), st.lists(st.text()))
def test_different_lists_of_texts_have_different_hashes(one, other):
    """Also where only the borders differ: ["ab"] and ["a", "b"]."""
    assert (sha256_text(*one) == sha256_text(*other)) == (one == other)
    joined = ["".join(one)]
    assert (sha256_text(*joined) == sha256_text(*one)) == (joined == one)


def test_layers_sort_as_numbers():
    keys = ["layers.10.x", "layers.2.x", "layers.2.a", "lm_head"]
    assert sorted(keys, key=natural_key) == ["layers.2.a", "layers.2.x", "layers.10.x", "lm_head"]
    assert sorted(["part²", "²", "part1²", "part1"], key=natural_key)[0] == "part1"


@pytest.mark.parametrize(
    "text, expected",
    [
        ("arc challenge / v1.5", "arc-challenge-v1.5"),
        ("con", "_con"),
        ("NUL.txt", "_NUL.txt"),
        ("lpt¹", "_lpt¹"),
        ("console", "console"),
        ("name. .", "name"),
        ("..", "unnamed"),
        ("e\u0301", "é"),
        ("a" * 119 + ".b", "a" * 119),
        ("詩" * 100, "詩" * 40),
    ],
)
def test_any_text_becomes_a_name_that_every_file_system_takes(text, expected):
    assert file_name(text) == expected


@given(text=st.text())
def test_the_name_of_a_name_is_itself(text):
    name = file_name(text)
    assert file_name(name) == name
    assert 0 < len(name.encode()) <= 121
    assert not name.startswith((".", "-"))
    assert not name.endswith((".", "-", " "))


def test_a_file_name_that_is_no_text_comes_back_from_json(tmp_path):
    name = b"caf\xe9.jsonl".decode(errors="surrogateescape")
    write_json(tmp_path / "x.json", {"path": name, "größe": "ü"})
    text = (tmp_path / "x.json").read_text(encoding="utf-8")
    assert json.loads(text) == {"path": name, "größe": "ü"}
    assert "größe" in text
