"""`loragen serve`: what it refuses to start with, and a server that is stopped while it works."""

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec

import pytest

from loragen.cli import serve

NEEDED = ("fastapi", "uvicorn", "prometheus_client")
needs_serve = pytest.mark.skipif(
    not all(map(find_spec, NEEDED)), reason="the extra serve is not installed"
)


def test_without_the_extra_it_says_what_to_install(fails, experiment, monkeypatch):
    monkeypatch.setattr(serve, "find_spec", lambda name: name != "uvicorn" and find_spec(name))
    text = fails(2, "serve", "--model", experiment)
    assert "uvicorn" in text
    assert "pip install '" in text


@needs_serve
class TestItDoesNotStart:
    @pytest.mark.parametrize("host", ["0.0.0.0", "::", ""])
    def test_where_others_reach_it_without_a_token(self, fails, experiment, host):
        text = fails(2, "serve", "--model", experiment, "--host", host)
        assert "clients need a token" in text

    def test_with_a_token_that_can_be_guessed(self, fails, experiment, monkeypatch):
        monkeypatch.setenv("LORAGEN_SERVE_TOKEN", "secret")
        assert "at least 16" in fails(2, "serve", "--model", experiment, "--host", "0.0.0.0")

    def test_with_a_token_that_is_not_there(self, fails, experiment, tmp_path):
        missing = tmp_path / "token"
        text = fails(2, "serve", "--model", experiment, "--token-file", missing)
        assert text == f"--token-file {missing}: No such file or directory"

    def test_where_another_server_is(self, fails, experiment):
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            text = fails(2, "serve", "--model", experiment, "--port", port)
        assert text == f"--host 127.0.0.1 --port {port}: Address already in use"

    def test_without_a_generator(self, fails, tmp_path):
        fails(2, "serve", "--model", tmp_path / "nothing")

    def test_with_a_vllm_that_would_see_no_files(self, fails, experiment):
        text = fails(2, "serve", "--model", experiment, "--vllm", "http://127.0.0.1:8000")
        assert "--output DIR" in text


@needs_serve
@pytest.mark.skipif(os.name == "nt", reason="SIGTERM ends a process at once on Windows")
def test_a_server_that_is_stopped_answers_what_it_has_accepted(experiment, tmp_path):
    command = [sys.executable, "-m", "loragen", "serve", "--model", str(experiment), "--port", "0"]
    server = subprocess.Popen(
        [*command, "--max-batch", "1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
    )
    try:
        url = server.stdout.readline().strip()
        assert url.startswith("http://127.0.0.1:"), server.stderr.read()

        def ask(number):
            prompts = [f"Question {number} about {word}?" for word in ("red", "green", "blue")]
            slow = {"draws": 32, "prompts_per_draw": 2, "format": "json"}
            body = json.dumps({"prompts": prompts, **slow}).encode()
            request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
            with urllib.request.urlopen(request, timeout=100) as answer:
                return answer.status

        def accepted():
            with urllib.request.urlopen(f"{url[: -len('v1/adapters')]}healthz") as answer:
                state = json.load(answer)
            return state["waiting"] + state["working"]

        with ThreadPoolExecutor(8) as clients:
            answers = [clients.submit(ask, number) for number in range(8)]
            while accepted() + sum(answer.done() for answer in answers) < 8:
                pass
            server.send_signal(signal.SIGTERM)
            found = [answer.result() for answer in answers]
        _, stderr = server.communicate(timeout=100)
    finally:
        server.kill()
    assert found == [201] * 8
    assert (server.returncode, stderr.splitlines()[-1:]) == (
        0,
        ["stopped; everything that was accepted has been answered"],
    )
