"""The HTTP side of `loragen serve`: routes, limits, the token, metrics, and vLLM's endpoint."""

import asyncio
import hmac
import json
import logging
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from time import perf_counter
from typing import IO, Annotated, Any, Literal
from urllib.parse import quote

from fastapi import FastAPI, Query, Request, Security
from fastapi import Path as PathParameter
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from fastapi.security import HTTPBearer
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel, Field, field_validator
from safetensors import safe_open

from loragen import __version__
from loragen.core.adapter import CONFIG_FILE, WEIGHTS_FILE, adapter_record
from loragen.core.contents import read_json
from loragen.core.errors import LoragenError, UsageError, WriteError, one_line
from loragen.serve.service import ID_LENGTH, AdapterService, QueueFullError, Wanted

log = logging.getLogger(__name__)

MOST_DRAWS = 64
CHUNK = 2**20  # bytes of a file at a time
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
"""Bounds of the histograms of time."""

Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]


@dataclass(frozen=True)
class Vllm:
    """A running vLLM that adapters are loaded into."""

    url: str
    directory: Path
    """The server's directory of adapters, by the path that vLLM has for it."""
    key: str | None = None
    """The key of its API (`--api-key`), if it has one."""


@dataclass(frozen=True)
class Settings:
    """How a server answers."""

    token: str | None = None
    """The bearer token of every request but those of /healthz; without one, only requests that are
    addressed to this machine by a loopback name are answered."""
    timeout: float = 60.0
    """Seconds after which a request is answered, by an error if need be."""
    max_bytes: int = 2**20
    """The largest body of a request."""
    max_prompts: int = 1000
    shared: bool = False
    """Whether clients see the directory of the adapters, too."""
    vllm: Vllm | None = None


class AdapterRequest(BaseModel, extra="forbid", strict=True):
    """Prompts of a dataset, and what to answer."""

    prompts: list[str] = Field(min_length=1, description="Prompts without labels, in any number.")
    draws: int = Field(
        1, ge=1, le=MOST_DRAWS, description="Average the adapters of N random draws of prompts."
    )
    prompts_per_draw: int | None = Field(
        None, ge=1, description="The prompts of a draw; null: as in training, at most half of all."
    )
    seed: int = Field(0, ge=-(2**63), lt=2**63, description="Seed of the draws.")
    format: Literal["zip", "safetensors", "json", "path", "vllm"] = Field(
        "zip",
        description="zip: the PEFT directory. safetensors: one file with the configuration in its "
        "metadata. json: what the adapter is; GET has its files. path: json with the path of the "
        "directory on a shared volume. vllm: json, once vLLM has loaded it.",
    )
    lora_name: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._:@/-]{0,127}$",
        description="The name of the adapter in vLLM; null: its id.",
    )
    replace: bool = Field(False, description="Replace an adapter of that name in vLLM.")

    @field_validator("prompts")
    @classmethod
    def _are_texts(cls, prompts: list[str]) -> list[str]:
        for prompt in prompts:
            try:
                prompt.encode()
            except UnicodeEncodeError:
                raise ValueError("half of a surrogate pair is no text") from None
        return prompts


class AdapterDescription(BaseModel):
    """What an adapter is and where it comes from."""

    id: str = Field(description="Of the generator, the prompts and the draws: equal ones have one.")
    sha256: dict[str, str] = Field(description="Hashes of the files of its PEFT directory.")
    values: int = Field(description="The number of values in its tensors.")
    warning: str | None = Field(description="Set where the prompts are unlike those of training.")
    origin: dict[str, Any] = Field(description="The generator, the prompts' hash, the distance.")
    adapter_config: dict[str, Any] = Field(description="PEFT's configuration.")
    path: str | None = Field(None, description="Its PEFT directory on the shared volume.")
    lora_name: str | None = Field(None, description="Its name in vLLM.")


class Problem(BaseModel):
    """Why a request has no other answer."""

    detail: str = Field(description="One line.")
    id: str | None = Field(None, description="The adapter's id, if it is known.")


class HttpError(Exception):
    """A request that ends with another status than it wants."""

    def __init__(
        self, status: int, detail: str, headers: Mapping[str, str] | None = None, identity: str = ""
    ) -> None:
        super().__init__(detail)
        self.status, self.headers = status, dict(headers or {})
        self.document = {"detail": detail, **({"id": identity} if identity else {})}


class Metrics:
    """What /metrics shows; each server has its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        prefix = "loragen_serve_"

        def histogram(name: str, text: str, buckets: Any = SECONDS, labels: Any = ()) -> Any:
            return Histogram(prefix + name, text, labels, buckets=buckets, registry=self.registry)

        self.requests = Counter(
            f"{prefix}requests", "Requests answered.", ("path", "status"), registry=self.registry
        )
        self.seconds = histogram("request_seconds", "Time of a request.", labels=("path",))
        self.stages = {
            "waited": histogram("wait_seconds", "Time of a request in the queue."),
            "generated": histogram("generate_seconds", "Time to compute an adapter."),
            "written": histogram("write_seconds", "Time to write an adapter."),
            "batch": histogram("batch_size", "Requests in work together.", (1, 2, 4, 8, 16, 32)),
        }

    def observe(self, stage: str, value: float) -> None:
        self.stages[stage].observe(value)

    def watch(self, service: AdapterService) -> None:
        """Adds the numbers of requests that wait and are worked on."""
        for name, text, read in (
            ("queue", "Requests that wait.", lambda: service.waiting),
            ("working", "Requests in work.", lambda: service.working),
        ):
            Gauge(f"loragen_serve_{name}", text, registry=self.registry).set_function(read)


def make_app(make_service: Callable[[Any], AdapterService], settings: Settings) -> Any:
    """Returns the ASGI application. `make_service` is called with what it reports measurements to
    (`AdapterService.observed`), when the application starts."""
    metrics = Metrics()
    answers = _Answers(settings, metrics)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        answers.service = make_service(metrics.observe)
        metrics.watch(answers.service)
        yield
        await answers.service.close()

    # The pages of FastAPI's own documentation would load scripts from a network.
    app = FastAPI(
        title="loragen serve",
        version=__version__,
        description="LoRA adapters from prompts, without training.",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
    )
    for error in (HttpError, LoragenError, RequestValidationError, Exception):
        app.add_exception_handler(error, _answer_error)
    bearer = [Security(HTTPBearer(auto_error=False, description="The token of the server."))]
    protected = {"dependencies": bearer} if settings.token else {}
    files: dict[str, Any] = {"schema": {"type": "string", "format": "binary"}}
    served = {
        "content": {
            "application/zip": files,
            "application/octet-stream": files,
            "application/json": {
                "schema": {"$ref": "#/components/schemas/AdapterDescription"},
            },
        }
    }

    def problems(**statuses: str) -> dict[int | str, dict[str, Any]]:
        common = {"400": "not HTTP, or no JSON", "408": "the body took too long"}
        common |= {"413": "the body is too large", "421": "addressed to another host"}
        common |= {"500": "an error of the server"} | statuses
        common |= {"401": "no bearer token, or a wrong one"} if settings.token else {}
        return {int(k[-3:]): {"model": Problem, "description": v} for k, v in common.items()}

    app.add_api_route(
        "/v1/adapters",
        answers.create,
        methods=["POST"],
        status_code=201,
        summary="Generate an adapter",
        response_class=Response,
        responses={
            200: {"description": "It was there already.", "model": AdapterDescription, **served},
            201: {"description": "It was generated.", "model": AdapterDescription, **served},
            **problems(
                s409="what the server was not started for",
                s422="no such request",
                s429="too many requests wait; Retry-After says when to try again",
                s502="vLLM has refused",
                s504="not done in time",
                s507="the disk is full",
            ),
        },
        **protected,
    )
    app.add_api_route(
        "/v1/adapters/{identity}",
        answers.read,
        methods=["GET"],
        summary="An adapter that was generated",
        response_class=Response,
        responses={
            200: {"description": "The adapter.", "model": AdapterDescription, **served},
            202: {"description": "It is in work; Retry-After says when to ask.", "model": Problem},
            **problems(s404="no such adapter", s422="no such request", s504="not done in time"),
        },
        **protected,
    )
    app.add_api_route(
        "/healthz",
        answers.health,
        methods=["GET"],
        summary="Whether the server answers",
        responses=problems(),
    )
    app.add_api_route(
        "/metrics",
        answers.metrics_text,
        methods=["GET"],
        summary="Measurements in Prometheus's format",
        response_class=Response,
        responses={
            200: {
                "description": "Text.",
                "content": {"text/plain": {"schema": {"type": "string"}}},
            },
            **problems(),
        },
        **protected,
    )
    return _Guard(app, settings, metrics)


class _Answers:
    """The routes."""

    service: AdapterService

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self.settings, self.metrics = settings, metrics

    async def create(self, wanted: AdapterRequest, request: Request) -> Response:
        """Generates the adapter of the prompts, the one that `loragen gen infer` writes."""
        if len(wanted.prompts) > self.settings.max_prompts:
            most = self.settings.max_prompts
            raise HttpError(413, f"{len(wanted.prompts)} prompts; at most {most} are taken")
        if wanted.format == "vllm" and not self.settings.vllm:
            raise HttpError(409, "format vllm: start the server with --vllm URL and --output DIR")
        if wanted.format == "path" and not self.settings.shared:
            raise HttpError(409, "format path: start the server with --output DIR")
        if wanted.format != "vllm" and (wanted.lora_name or wanted.replace):
            raise HttpError(422, "lora_name, replace: they go with format vllm")
        how = (wanted.draws, wanted.prompts_per_draw, wanted.seed)
        asked = Wanted.checked(wanted.prompts, *how)
        identity = asked.identity(self.service.fingerprint)
        with self.service.store.using(identity):
            async with self._deadline(request, identity):
                directory = await self.service.find(identity)
                status = 200 if directory else 201
                if directory is None:
                    directory = await self.service.make(identity, asked)
                more: dict[str, Any] = {}
                if self.settings.shared:
                    more["path"] = str(directory)
                if wanted.format == "vllm" and self.settings.vllm:
                    more["lora_name"] = wanted.lora_name or identity
                    left = request.scope["deadline"] - perf_counter()
                    what = (self.settings.vllm, identity, wanted.lora_name, wanted.replace)
                    await asyncio.to_thread(load_into_vllm, *what, max(left, 0.1))
                return await self._adapter(identity, directory, wanted.format, status, more)

    async def read(
        self,
        request: Request,
        identity: Annotated[str, PathParameter(pattern=f"^[0-9a-f]{{{ID_LENGTH}}}$")],
        format: Annotated[
            Literal["json", "safetensors", "zip"], Query(description="As in POST.")
        ] = "json",
    ) -> Response:
        """Returns an adapter by its id."""
        with self.service.store.using(identity):
            async with self._deadline(request, identity):
                directory = await self.service.find(identity)
                if directory is None and self.service.is_in_work(identity):
                    document = {"detail": "in work", "id": identity}
                    return JSONResponse(document, 202, {"Retry-After": "1"})
                if directory is None:
                    raise HttpError(404, "no such adapter; it may have been dropped since")
                more = {"path": str(directory)} if self.settings.shared else {}
                return await self._adapter(identity, directory, format, 200, more)

    async def health(self) -> dict[str, Any]:
        """Returns the generator and how many requests there are."""
        service = self.service
        return {
            "status": "ok",
            "generator": service.generator.name,
            "base_model": service.generator.base_model,
            "waiting": service.waiting,
            "working": service.working,
        }

    async def metrics_text(self) -> Response:
        text = generate_latest(self.metrics.registry)
        return Response(text, media_type=CONTENT_TYPE_LATEST)

    @asynccontextmanager
    async def _deadline(self, request: Request, identity: str) -> AsyncIterator[None]:
        try:
            left = max(0.0, request.scope["deadline"] - perf_counter())
            async with asyncio.timeout(left):
                yield
        except TimeoutError:
            raise HttpError(
                504,
                f"not done within {self.settings.timeout:g} s; if it was begun, GET has it later",
                identity=identity,
            ) from None
        except QueueFullError as error:
            headers = {"Retry-After": str(error.retry_after)}
            raise HttpError(429, str(error), headers, identity) from None

    async def _adapter(
        self, identity: str, directory: Path, form: str, status: int, more: Mapping[str, Any]
    ) -> Response:
        """Returns the adapter as a file, or its description."""
        service = self.service
        values = service.generator.layout.values
        described = await service.on_disk(described_adapter, identity, directory, values)
        headers = {"Location": f"/v1/adapters/{identity}"}
        if form not in ("zip", "safetensors"):
            document = described.model_copy(update=dict(more)).model_dump(mode="json")
            return JSONResponse(document, status, headers)
        opened = await service.on_disk(service.store.open_file, identity, f".{form}")
        headers |= {
            "Content-Length": str(opened.seek(0, 2)),
            "Content-Disposition": f'attachment; filename="{identity}.{form}"',
            "Loragen-Adapter": identity,
        }
        opened.seek(0)
        if described.warning:
            headers["Loragen-Warning"] = quote(described.warning, safe=" !#$&'()*+,-./:;<=>?@_|~")
        kind = "application/zip" if form == "zip" else "application/octet-stream"
        return StreamingResponse(_chunks(opened), status, headers, kind)


def described_adapter(identity: str, directory: Path, values: int) -> AdapterDescription:
    """Returns what the files of a PEFT directory say of it; no weights are read."""
    from loragen.core.adapter.files import LINEAGE
    from loragen.core.generator.generated import Origin

    with safe_open(directory / WEIGHTS_FILE, "pt") as opened:
        lineage = json.loads((opened.metadata() or {}).get(LINEAGE, "{}"))
    origin = {key: value for key, value in lineage.items() if key != "command"}
    record = adapter_record(directory) or {}
    return AdapterDescription(
        id=identity,
        sha256={name: digest for name, digest in record.items() if digest},
        values=values,
        warning=Origin(**origin).warning(),
        origin=origin,
        adapter_config=read_json(directory / CONFIG_FILE),
    )


def _chunks(opened: IO[bytes]) -> Iterator[bytes]:
    """Yields a file in pieces; it may have been deleted since it was opened."""
    with opened:
        while piece := opened.read(CHUNK):
            yield piece


def load_into_vllm(
    vllm: Vllm, identity: str, name: str | None, replace: bool, timeout: float
) -> None:
    """Makes vLLM load an adapter, by `POST /v1/load_lora_adapter`. Raises HttpError if it does not.

    An id stands for one adapter: if vLLM has one of that name, it is the same.
    """
    path = vllm.directory / identity
    document = {"lora_name": name or identity, "lora_path": str(path)}
    headers = {"Content-Type": "application/json"}
    headers |= {"Authorization": f"Bearer {vllm.key}"} if vllm.key else {}
    request = urllib.request.Request(
        f"{vllm.url.rstrip('/')}/v1/load_lora_adapter",
        json.dumps(document | ({"load_inplace": True} if replace else {})).encode(),
        headers,
    )
    try:
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            answer.read(CHUNK)
    except urllib.error.HTTPError as error:
        said = _message(error.read(CHUNK)) or f"HTTP {error.code}"
        if error.code == 400 and name is None and "already been" in said:
            return
        if error.code == 404 and said == "Not Found":
            said += "; it needs --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"
        raise HttpError(502, f"vLLM at {vllm.url}: {said}", identity=identity) from None
    except TimeoutError:
        raise
    except OSError as error:  # URLError is one
        reason = getattr(error, "reason", error)
        if isinstance(reason, TimeoutError):
            raise TimeoutError from None
        problem = getattr(reason, "strerror", None) or reason
        raise HttpError(502, f"vLLM at {vllm.url}: {problem}", identity=identity) from None


def _message(answer: bytes) -> str:
    """Returns the message of an error of vLLM, in the form of any version, or of FastAPI."""
    try:
        document = json.loads(answer)
    except ValueError:
        document = answer.decode(errors="replace")
    for key in ("error", "message", "detail"):
        if isinstance(document, dict) and key in document:
            document = document[key]
    return " ".join(str(document).split())[:500]


async def _answer_error(_: Any, error: Exception) -> Response:
    """Answers an error in one line."""
    headers: dict[str, str] = {}
    match error:
        case HttpError():
            status, document, headers = error.status, error.document, error.headers
        case RequestValidationError():
            first, *others = error.errors()
            place = ".".join(str(part) for part in first["loc"] if part != "body")
            more = f" (and {len(others)} more)" if others else ""
            if not place or first["type"] == "json_invalid":
                place, more = "body", "; send a JSON object with Content-Type: application/json"
            status, document = 422, {"detail": f"{place}: {first['msg']}{more}"}
        case UsageError():
            status, document = 422, {"detail": one_line(error)}
        case LoragenError():
            status = 507 if isinstance(error, WriteError) else 500
            document = {"detail": one_line(error)}
            log.error("%s", one_line(error))
        case _:
            status, document = 500, {"detail": "an error of the server; its log says which"}
            log.error("%s", one_line(error), exc_info=error)
    # Not JSONResponse: a message may quote what is no valid Unicode.
    return Response(json.dumps(document), status, headers, "application/json")


class _Guard:
    """Stands before the application: hosts, token, the size of bodies, deadlines, counting."""

    def __init__(self, app: FastAPI, settings: Settings, metrics: Metrics) -> None:
        self.app, self.settings, self.metrics = app, settings, metrics

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, answered = perf_counter(), 500
        scope["deadline"] = started + self.settings.timeout

        async def counted(message: Any) -> None:
            nonlocal answered
            if message["type"] == "http.response.start":
                answered = message["status"]
            await send(message)

        try:
            refused, body = self._refused(scope), b""
            if refused is None:
                refused, body = await self._body(scope, receive)
            if refused:
                answer = await _answer_error(None, refused)
                await answer(scope, receive, counted)
            else:
                await self.app(scope, _replayed(body, receive), counted)
        finally:
            path = getattr(scope.get("route"), "path", "other")
            self.metrics.requests.labels(path, answered).inc()
            self.metrics.seconds.labels(path).observe(perf_counter() - started)

    def _refused(self, scope: Any) -> HttpError | None:
        """Returns why a request is not read at all, or None."""
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        if self.settings.token is None:
            # A page that a browser shows may point a name of its own at this machine.
            if not is_loopback(_host(headers.get(b"host", ""))):
                return HttpError(421, "addressed to another host than this machine; use a token")
            return None
        if scope["path"] == "/healthz":
            return None
        kind, _, given = headers.get(b"authorization", "").partition(" ")
        right = hmac.compare_digest(given.strip().encode(), self.settings.token.encode())
        if kind.lower() == "bearer" and right:
            return None
        return HttpError(401, "no bearer token, or a wrong one", {"WWW-Authenticate": "Bearer"})

    async def _body(self, scope: Any, receive: Receive) -> tuple[HttpError | None, bytes]:
        """Returns the whole body, or why it is not read."""
        most, parts, size, more = self.settings.max_bytes, [], 0, True
        too_large = HttpError(413, f"the body has more than {most} bytes", {"Connection": "close"})
        length = dict(scope["headers"]).get(b"content-length", b"")
        if length.isdigit() and int(length) > most:
            return too_large, b""
        try:
            async with asyncio.timeout(self.settings.timeout):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        break
                    parts.append(message.get("body", b""))
                    size, more = size + len(parts[-1]), message.get("more_body", False)
                    if size > most:
                        return too_large, b""
        except TimeoutError:
            return HttpError(408, "the body took too long", {"Connection": "close"}), b""
        return None, b"".join(parts)


def _replayed(body: bytes, receive: Receive) -> Receive:
    """Returns a `receive` that gives the body first."""
    messages = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def first_the_body() -> Any:
        return next(messages, None) or await receive()

    return first_the_body


def _host(header: str) -> str:
    """Returns the host of a `Host` header, without the port."""
    name = header.rpartition(":")[0] if not header.endswith("]") and ":" in header else header
    return name.strip("[]")


def is_loopback(host: str) -> bool:
    """Returns whether a host is this machine alone, by its name or address."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"
