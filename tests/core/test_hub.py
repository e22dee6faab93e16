"""Whether the hub can be asked; tests/core/data/test_documents.py asks one that is not there."""

import errno
from http.client import BadStatusLine
from urllib.error import HTTPError, URLError

import pytest

from loragen.core import files as hub


@pytest.fixture
def answer(monkeypatch):
    """`answer(error)`: what is told of a hub whose answer is that."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)

    def told(error):
        def urlopen(*_, **__):
            raise error

        monkeypatch.setattr(hub, "urlopen", urlopen)
        hub.silence.cache_clear()
        return hub.silence()

    yield told
    hub.silence.cache_clear()


@pytest.mark.parametrize(
    "error",
    [
        URLError(ConnectionRefusedError()),
        URLError(OSError(errno.ENETUNREACH, "Network is unreachable")),
        TimeoutError(),
        BadStatusLine("of a proxy"),
    ],
    ids=repr,
)
def test_a_hub_that_gives_no_answer_is_silent(answer, error):
    assert "does not answer" in answer(error)


def test_a_hub_that_refuses_has_answered(answer):
    assert answer(HTTPError("https://hub", 403, "no", {}, None)) is None


def test_an_endpoint_that_is_no_address_is_told(answer, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "hf-mirror.com")
    assert "HF_ENDPOINT hf-mirror.com is no address" in answer(ValueError("unknown url type"))
