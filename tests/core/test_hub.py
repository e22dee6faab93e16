import errno
from http.client import BadStatusLine
from urllib.error import HTTPError, URLError

import pytest

from loragen.core.hub import hub_problem


@pytest.fixture
def answer(monkeypatch):
    """`answer(error)`: the problem of a hub whose answer is that."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)

    def problem(error):
        def urlopen(*_, **__):
            raise error

        monkeypatch.setattr("urllib.request.urlopen", urlopen)
        hub_problem.cache_clear()
        return hub_problem()

    yield problem
    hub_problem.cache_clear()


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
def test_a_hub_that_gives_no_answer_is_a_problem(answer, error):
    assert "does not answer" in answer(error)


def test_a_hub_that_refuses_has_answered(answer):
    assert answer(HTTPError("https://hub", 403, "no", {}, None)) is None


def test_an_endpoint_has_to_be_a_url(answer, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "hf-mirror.com")
    assert "HF_ENDPOINT hf-mirror.com is not a URL" in answer(ValueError("unknown url type"))
