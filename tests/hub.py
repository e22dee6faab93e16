"""A stand-in of the Hugging Face hub's API: repositories of models in memory, on this machine."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

LFS = (".safetensors", ".bin", ".ckpt", ".pt")


class StandIn:
    """What the hub has: {repository: {commit: {path: bytes}}}, the newest commit last."""

    def __init__(self):
        self.repositories, self.private, self.objects = {}, {}, {}
        self.requests = []

    def commit(self, repository, files, deleted=()):
        """A new commit with these files instead of earlier ones of their names."""
        commits = self.repositories.setdefault(repository, {})
        whole = {**(list(commits.values())[-1] if commits else {}), **files}
        whole = {path: content for path, content in whole.items() if path not in deleted}
        name = hashlib.sha1(f"{repository}{len(commits)}".encode()).hexdigest()
        commits[name] = whole
        return name

    def upload(self, repository, directory):
        """A commit with all files of a directory."""
        paths = (path for path in directory.rglob("*") if path.is_file())
        return self.commit(
            repository, {p.relative_to(directory).as_posix(): p.read_bytes() for p in paths}
        )

    def newest(self, repository):
        return list(self.repositories[repository].values())[-1]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def hub(self):
        return self.server.hub

    def log_message(self, *arguments):
        pass

    def answer(self, status, document=None, content=b"", headers=()):
        if document is not None:
            content = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        for name, value in dict(headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def missing(self, code):
        self.answer(404, {"error": code}, headers={"X-Error-Code": code})

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path))
        if path == "/":
            return self.answer(200)
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(revision|tree)/([^/]+)", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        repository = (api or file or ["", ""])[1]
        if repository not in self.hub.repositories:
            return self.missing("RepoNotFound")
        if self.hub.private.get(repository) and "Authorization" not in self.headers:
            return self.missing("RepoNotFound")
        commits = self.hub.repositories[repository]
        revision = api[3] if api else file[2]
        revision = list(commits)[-1] if revision == "main" else revision
        if revision not in commits:
            return self.missing("RevisionNotFound")
        files = commits[revision]
        if api and api[2] == "revision":
            siblings = [{"rfilename": name} for name in files]
            return self.answer(200, {"id": repository, "sha": revision, "siblings": siblings})
        if api:
            tree = [
                {"type": "file", "path": name, "size": len(data), "oid": self.etag(data)}
                for name, data in files.items()
            ]
            return self.answer(200, tree)
        if file[3] not in files:
            return self.missing("EntryNotFound")
        data = files[file[3]]
        return self.answer(
            200, None, data, {"ETag": f'"{self.etag(data)}"', "X-Repo-Commit": revision}
        )

    def do_HEAD(self):
        self.do_GET()

    @staticmethod
    def etag(data):
        return hashlib.sha1(data).hexdigest()

    def do_POST(self):
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path))
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if path == "/api/validate-yaml":  # as it does before every commit of a card
            return self.answer(200, {"errors": [], "warnings": []})
        if self.headers.get("Authorization") != "Bearer hf_right":
            return self.answer(401, {"error": "Invalid username or password."})
        if path == "/api/repos/create":
            document = json.loads(body)
            name = f"{document.get('organization') or 'me'}/{document['name']}"
            if name in self.hub.repositories:
                return self.answer(409, {"url": f"{self.server.url}/{name}"})
            self.hub.commit(name, {".gitattributes": b""})  # as the hub does
            private = document.get("private") or document.get("visibility") == "private"
            self.hub.private[name] = bool(private)
            return self.answer(200, {"url": f"{self.server.url}/{name}"})
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/main", path):
            files = [
                {
                    "path": one["path"],
                    "uploadMode": "lfs" if one["path"].endswith(LFS) else "regular",
                    "shouldIgnore": False,
                }
                for one in json.loads(body)["files"]
            ]
            return self.answer(200, {"files": files})
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = [
                {**one, "actions": {"upload": {"href": f"{self.server.url}/lfs/{one['oid']}"}}}
                for one in json.loads(body)["objects"]
            ]
            return self.answer(200, {"transfer": "basic", "objects": objects})
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path)
        files, deleted = {}, []
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            newest = list(self.hub.repositories[found[1]])[-1]
            if line["key"] == "header" and value.get("parentCommit", newest) != newest:
                return self.answer(412, {"error": "A commit has happened since."})
            if line["key"] == "deletedFile":
                deleted.append(value["path"])
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
        commit = self.hub.commit(found[1], files, deleted)
        url = f"{self.server.url}/{found[1]}/commit/{commit}"
        return self.answer(200, {"success": True, "commitOid": commit, "commitUrl": url})

    def do_PUT(self):
        data = self.rfile.read(int(self.headers["Content-Length"]))
        oid = self.path.rpartition("/")[2]
        assert hashlib.sha256(data).hexdigest() == oid
        self.hub.objects[oid] = data
        self.answer(200)


def serve():
    """Returns a server, with its `url` and its `hub`, that answers in a thread until it is shut."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.hub, server.url = StandIn(), f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server
