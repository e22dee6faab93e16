"""What clients of the server get: the adapters of `gen infer`, limits, tokens, vLLM, metrics."""

import asyncio
import io
import json
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from safetensors.torch import load as load_tensors
from typer.testing import CliRunner

from loragen.cli.main import app as command_line
from loragen.serve.app import Settings, Vllm, is_loopback, make_app
from tests.serve.conftest import PROMPTS


def post(client, prompts=PROMPTS, **more):
    return client.post("/v1/adapters", json={"prompts": prompts, **more})


def unzipped(content):
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        assert archive.testzip() is None
        return {name: archive.read(name) for name in archive.namelist()}


def inferred(experiment, output, prompts=PROMPTS, *more):
    """What `gen infer` writes: {name: content} of a directory, or the content of a file."""
    given = [word for prompt in prompts for word in ("--prompt", prompt)]
    arguments = ["gen", "infer", "--model", str(experiment), "--output", str(output), *given, *more]
    result = CliRunner().invoke(command_line, arguments)
    assert result.exit_code == 0, result.output
    if output.is_file():
        return output.read_bytes()
    return {file.name: file.read_bytes() for file in output.iterdir()}


class TestAnAdapter:
    def test_is_the_one_that_gen_infer_writes(self, served, experiment, tmp_path):
        with served() as client:
            zipped, alone = post(client), post(client, format="safetensors")
            described = post(client, format="json").json()
        assert (zipped.status_code, alone.status_code) == (201, 200)
        directory = inferred(experiment, tmp_path / "adapter")
        assert unzipped(zipped.content) == directory
        assert alone.content == inferred(experiment, tmp_path / "adapter.safetensors")
        assert described["adapter_config"] == json.loads(directory["adapter_config.json"])
        assert described["sha256"].keys() == {"adapter_config.json", "adapter_model.safetensors"}
        assert described["origin"]["prompts"] == len(PROMPTS)

    def test_of_draws_is_the_one_that_gen_infer_writes(self, served, experiment, tmp_path):
        with served() as client:
            answer = post(client, draws=2, prompts_per_draw=2, seed=5)
        draws = ("--draws", "2", "--prompts-per-draw", "2", "--seed", "5")
        assert unzipped(answer.content) == inferred(experiment, tmp_path / "a", PROMPTS, *draws)

    def test_does_not_depend_on_those_beside_it(self, served, generator):
        every = [[f"Question {i} about {word}?" for word in ("red", "cat")] for i in range(12)]
        with served() as client, ThreadPoolExecutor(12) as clients:
            answers = list(clients.map(lambda one: post(client, one, format="safetensors"), every))
            text = client.get("/metrics").text
        for prompts, answer in zip(every, answers, strict=True):
            expected = generator.generate(prompts).tensors
            found = load_tensors(answer.content)
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[key], expected[key]) for key in expected)
        assert 'loragen_serve_requests_total{path="/v1/adapters",status="201"} 12.0' in text

    def test_can_be_asked_for_again(self, served):
        with served() as client:
            first = post(client)
            place = first.headers["location"]
            assert client.get(place).json()["id"] == first.headers["loragen-adapter"]
            assert client.get(place, params={"format": "zip"}).content == first.content
            assert client.get("/v1/adapters/" + 32 * "0").status_code == 404
            assert client.get("/v1/adapters/..%2F..%2Fsecret").status_code in (404, 422)

    def test_tells_of_prompts_that_are_too_few(self, served, generator):
        prompts = ["About red?"]
        warning = generator.generate(prompts).origin.warning()
        assert warning
        with served() as client:
            assert post(client, prompts).headers["loragen-warning"] == warning
            assert post(client, prompts, format="json").json()["warning"] == warning


class TestAQueue:
    def test_computes_equal_requests_once(self, served, held):
        with served() as client, ThreadPoolExecutor(4) as clients:
            answers = [clients.submit(post, client) for _ in range(4)]
            assert held.begun.acquire(timeout=60)
            held.go.set()
            contents = {answer.result().content for answer in answers}
        assert (len(contents), held.calls) == (1, 1)

    def test_that_is_full_says_when_to_try_again(self, served, held):
        with served(batch=1, queue=1) as client, ThreadPoolExecutor(2) as clients:
            first = clients.submit(post, client)
            assert held.begun.acquire(timeout=60)
            second = clients.submit(post, client, ["Another?"])
            while client.get("/healthz").json()["waiting"] < 1:
                time.sleep(0.01)
            refused = post(client, ["A third?"])
            assert refused.status_code == 429
            assert int(refused.headers["retry-after"]) >= 1
            held.go.set()
            assert (first.result().status_code, second.result().status_code) == (201, 201)
            assert post(client, ["A third?"]).status_code == 201

    def test_keeps_what_was_begun_when_a_client_has_given_up(self, served, held):
        with served(batch=1, timeout=0.5) as client, ThreadPoolExecutor(2) as clients:
            begun, queued = (clients.submit(post, client, [text]) for text in ("One?", "Two?"))
            answers = [begun.result(), queued.result()]
            assert [answer.status_code for answer in answers] == [504, 504]
            first, second = (f"/v1/adapters/{answer.json()['id']}" for answer in answers)
            states = {client.get(first).status_code, client.get(second).status_code}
            assert states == {202, 404}  # the one that was not begun is dropped
            held.go.set()
            place = first if client.get(second).status_code == 404 else second
            while (answer := client.get(place)).status_code == 202:
                time.sleep(0.01)
            assert answer.status_code == 200
        assert held.calls == 1

    def test_finishes_what_it_accepted(self, served, held):
        with ThreadPoolExecutor(4) as clients:
            with served(batch=1) as client:
                answers = [clients.submit(post, client, [f"Question {i}?"]) for i in range(3)]
                while (state := client.get("/healthz").json())["waiting"] < 2:
                    time.sleep(0.01)
                assert state["working"] == 1
                threading.Timer(0.2, held.go.set).start()
            assert [answer.result().status_code for answer in answers] == [201] * 3


class TestWhatIsRefused:
    @pytest.mark.parametrize(
        ("document", "words"),
        [
            ({}, "prompts: Field required"),
            ({"prompts": []}, "at least 1 item"),
            ({"prompts": ["  ", ""]}, "all of them are empty"),
            ({"prompts": ["a", 3]}, "prompts.1: Input should be a valid string"),
            ({"prompts": ["a"], "prompt": "b"}, "prompt: Extra inputs are not permitted"),
            ({"prompts": ["a"], "seed": "1"}, "seed: Input should be a valid integer"),
            ({"prompts": ["a"], "draws": 2}, "there are 1"),
            ({"prompts": ["a"], "lora_name": "b"}, "they go with format vllm"),
        ],
    )
    def test_it_says_what_is_wrong(self, served, document, words):
        with served() as client:
            answer = client.post("/v1/adapters", json=document)
        assert answer.status_code == 422
        assert words in answer.json()["detail"]

    @pytest.mark.parametrize("kind", ["application/json", "application/x-www-form-urlencoded"])
    @pytest.mark.parametrize("body", [b"", b"[1]", b'{"prompts": ["a"]', b"\xff"])
    def test_what_is_no_json_object(self, served, body, kind):
        with served() as client:
            headers = {"content-type": kind}
            answer = client.post("/v1/adapters", content=body, headers=headers)
        assert answer.status_code in (400, 422)
        assert answer.status_code == 400 or "Content-Type" in answer.json()["detail"]

    def test_half_a_surrogate_pair(self, served):
        body = b'{"prompts": ["\\ud800"], "\\udfff": 1}'
        with served() as client:
            answer = client.post(
                "/v1/adapters", content=body, headers={"content-type": "application/json"}
            )
        assert answer.status_code == 422

    def test_what_the_server_was_not_started_for(self, served):
        with served() as client:
            for form in ("path", "vllm"):
                answer = post(client, format=form)
                assert answer.status_code == 409
                assert "--output DIR" in answer.json()["detail"]

    def test_too_much(self, served):
        with served(max_bytes=1000, max_prompts=5) as client:
            assert post(client, ["x" * 2000]).status_code == 413
            pieces = (b"x" * 400 for _ in range(5))  # without a length that is said before
            assert client.post("/v1/adapters", content=pieces).status_code == 413
            assert post(client, ["x"] * 6).status_code == 413
            assert post(client, ["x"] * 5).status_code == 201

    def test_a_body_that_does_not_end(self):
        sent = []

        async def receive():
            await asyncio.sleep(60)

        async def send(message):
            sent.append(message)

        def make(observed):
            raise AssertionError("the body comes first")

        scope = {"type": "http", "path": "/v1/adapters", "headers": [(b"host", b"localhost")]}
        asyncio.run(make_app(make, Settings(timeout=0.05))(scope, receive, send))
        assert sent[0]["status"] == 408

    def test_others_without_the_token(self, served):
        with served(token="a token of the right length") as client:
            for given in ({}, {"authorization": "Bearer another"}, {"authorization": "Basic x"}):
                answer = client.post("/v1/adapters", json={"prompts": ["a"]}, headers=given)
                assert answer.status_code == 401
                assert answer.headers["www-authenticate"] == "Bearer"
                assert client.get("/metrics", headers=given).status_code == 401
            assert client.get("/healthz").status_code == 200
            client.headers["authorization"] = "Bearer a token of the right length"
            assert post(client).status_code == 201
            assert client.get("/healthz", headers={"host": "example.org"}).status_code == 200

    def test_names_of_others_that_lead_to_this_machine(self, served):
        with served() as client:
            assert client.get("/healthz", headers={"host": "example.org"}).status_code == 421
            for host in ("localhost:8080", "127.0.0.1", "[::1]:80", "[::1]"):
                assert client.get("/healthz", headers={"host": host}).status_code == 200, host
        assert not is_loopback("127.0.0.1.example.org")


class TestADirectory:
    def test_of_the_users_has_all_adapters(self, served, experiment, tmp_path):
        shared = tmp_path / "shared"
        with served(shared, keep=1) as client:
            paths = [
                post(client, [f"Question {i}?"], format="path").json()["path"] for i in range(3)
            ]
        written = {str(path) for path in shared.iterdir()}
        assert written == set(paths)
        prompts, directory = ["Question 1?"], shared / paths[1]
        found = {file.name: file.read_bytes() for file in directory.iterdir()}
        assert found == inferred(experiment, tmp_path / "adapter", prompts)

    def test_is_known_to_the_next_server(self, served, tmp_path, held):
        held.go.set()
        with served(tmp_path) as client:
            first = post(client)
        with served(tmp_path) as client:
            second = post(client)
            assert (second.status_code, second.content, held.calls) == (200, first.content, 1)
        weights = tmp_path / first.headers["loragen-adapter"] / "adapter_model.safetensors"
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)
        with served(tmp_path) as client:
            damaged = post(client)
        assert damaged.status_code == 500
        assert "is not as loragen has written it" in damaged.json()["detail"]

    def test_that_is_temporary_has_the_last_ones(self, served):
        with served(keep=2) as client:
            places = [post(client, [f"Question {i}?"]).headers["location"] for i in range(4)]
            assert [client.get(place).status_code for place in places] == [404, 404, 200, 200]
            home = client.service.store.directory
            assert len(list(home.iterdir())) == 2
        assert not home.exists()


class VllmStandIn(BaseHTTPRequestHandler):
    """vLLM's `/v1/load_lora_adapter` as its sources have it (vllm/entrypoints/openai/models)."""

    def log_message(self, *arguments):
        pass

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, self.headers["Authorization"], asked))
        name, loaded = asked["lora_name"], self.server.loaded
        if not self.server.enabled:
            self.answer(404, json.dumps({"detail": "Not Found"}))
        elif name in loaded and not asked.get("load_inplace"):
            text = f"The lora adapter '{name}' has already been loaded."
            error = {"message": text, "type": "InvalidUserInput", "param": None, "code": 400}
            self.answer(400, json.dumps({"error": error}))
        else:
            with (
                self.server.seen / asked["lora_path"].rpartition("/")[2] / "adapter_config.json"
            ).open() as file:
                loaded[name] = json.load(file)
            self.answer(200, f"Success: LoRA adapter '{name}' added successfully.")

    def answer(self, status, text):
        content = text.encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture
def vllm(tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), VllmStandIn)
    server.asked, server.loaded, server.enabled, server.seen = [], {}, True, tmp_path / "shared"
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


class TestVllm:
    def test_has_the_adapter_when_the_client_has_its_answer(self, served, vllm):
        target = Vllm(vllm.url, vllm.seen, "a key")
        with served(vllm.seen, vllm=target) as client:
            answer = post(client, format="vllm", lora_name="mine").json()
        path = f"{vllm.seen}/{answer['id']}"
        asked = {"lora_name": "mine", "lora_path": path}
        assert vllm.asked == [("/v1/load_lora_adapter", "Bearer a key", asked)]
        assert vllm.loaded["mine"] == answer["adapter_config"]
        assert (answer["lora_name"], answer["path"]) == ("mine", path)

    def test_may_have_it_already(self, served, vllm):
        with served(vllm.seen, vllm=Vllm(vllm.url, vllm.seen)) as client:
            assert [post(client, format="vllm").status_code for _ in range(2)] == [201, 200]
            assert post(client, format="vllm", lora_name="mine").status_code == 200
            taken = post(client, ["Another?"], format="vllm", lora_name="mine")
            assert taken.status_code == 502
            assert "'mine' has already been loaded" in taken.json()["detail"]
            assert post(
                client, ["Another?"], format="vllm", lora_name="mine", replace=True
            ).is_success
        assert vllm.asked[-1][2]["load_inplace"] is True

    def test_that_refuses_or_is_not_there_is_named(self, served, vllm):
        with served(vllm.seen, vllm=Vllm(vllm.url, vllm.seen)) as client:
            vllm.enabled = False
            refused = post(client, format="vllm")
            assert (refused.status_code, "VLLM_ALLOW_RUNTIME" in refused.text) == (502, True)
            vllm.shutdown()
            vllm.server_close()
            absent = post(client, format="vllm")
            assert absent.status_code == 502
            assert absent.json()["detail"].endswith("Connection refused")


def test_metrics_have_the_stages(served):
    with served() as client:
        post(client)
        post(client)
        text = client.get("/metrics").text
    for line in (
        'requests_total{path="/v1/adapters",status="201"} 1.0',
        'requests_total{path="/v1/adapters",status="200"} 1.0',
        "generate_seconds_count 1.0",
        "write_seconds_count 1.0",
        "queue 0.0",
    ):
        assert f"loragen_serve_{line}" in text
    assert "process_resident_memory_bytes" in text
