import pytest

from loragen import LoragenError
from loragen.core.errors import (
    ConfigError,
    DataError,
    PluginError,
    did_you_mean,
    display_width,
    first_line,
    listing,
    one_line,
    shortened,
)


@pytest.mark.parametrize(
    "error, code", [(LoragenError, 1), (DataError, 1), (PluginError, 2), (ConfigError, 2)]
)
def test_exit_codes(error, code):
    assert error("no such thing").exit_code == code


def test_problems_are_kept_apart():
    error = ConfigError("one", "two")
    assert error.problems == ("one", "two")
    assert str(error) == "one\ntwo"


@pytest.mark.parametrize(
    "error, line",
    [
        (ValueError("\n  no good \n at all"), "no good"),
        (ImportError(), "ImportError"),
        (RuntimeError(" \n"), "RuntimeError"),
    ],
)
def test_the_first_line_of_an_error_is_never_missing(error, line):
    assert first_line(error) == line


@pytest.mark.parametrize(
    "error, text",
    [
        (ConfigError("one", "two"), "one (and 1 more)"),
        (ValueError("no\n  good"), "ValueError: no good"),
        (KeyError(), "KeyError: no message"),
    ],
)
def test_any_error_in_one_line(error, text):
    assert one_line(error) == text


def test_did_you_mean():
    assert did_you_mean("sbrt", ["sbert", "cosine"]) == " Did you mean 'sbert'?"
    assert did_you_mean("xyz", ["sbert", "cosine"]) == ""


def test_listing_counts_what_it_leaves_out():
    assert listing([]) == "none"
    assert listing(["a", "b"]) == "a, b"
    assert listing(["a", "b", "c"], limit=2) == "a, b and 1 more"


def test_a_prompt_of_a_whole_book_is_shortened_at_once():
    found = shortened("Once " + "upon a time " * 50_000 + "the end.", 60)
    assert display_width(found) == 60
    assert found.startswith("Once upon") and found.endswith("the end.")
