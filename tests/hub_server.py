"""A Hugging Face Hub for tests: what `huggingface_hub` asks for when it makes, fills, lists and fetches repositories.

Real HTTP on 127.0.0.1, real requests of the real client; the server keeps files in memory, one commit after another,
and a list of what it was asked.
"""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit


class HubServer:
    """Repositories by id; each is a list of commits, and a commit a mapping from paths to bytes."""

    def __init__(self, token: str = "hf_secret") -> None:
        self.token = token
        self.repositories: dict[str, list[dict[str, bytes]]] = {}
        self.messages: list[str] = []
        self.seen: list[tuple[str, str]] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                hub._answer(self)

            do_HEAD = do_POST = do_GET

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self._thread.start()
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def put(self, repository: str, files: dict[str, bytes]) -> None:
        """A commit from elsewhere."""
        commits = self.repositories.setdefault(repository, [{}])
        commits.append({**commits[-1], **files})

    def fetched(self, since: int = 0) -> list[str]:
        """Paths whose bytes were asked for."""
        return sorted(
            {
                path.split("/resolve/")[1].partition("/")[2]
                for method, path in self.seen[since:]
                if (method == "GET" and "/resolve/" in path)
            }
        )

    # ---- requests ------------------------------------------------------------------------------------------------

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        url = urlsplit(request.path)
        path = unquote(url.path)
        self.seen.append((request.command, path))
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        authorised = request.headers.get("Authorization") == f"Bearer {self.token}"
        status, headers, content = self._route(request.command, path, parse_qs(url.query), body, authorised)
        request.send_response(status)
        for name, value in headers.items():
            request.send_header(name, value)
        request.send_header("Content-Length", str(len(content)))
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(content)

    def _route(
        self, method: str, path: str, query: dict[str, list[str]], body: bytes, authorised: bool
    ) -> tuple[int, dict[str, str], bytes]:
        if method == "POST" and not authorised:
            return _json({"error": "Invalid username or password."}, 401)
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else f"me/{asked['name']}"
            if name in self.repositories:
                return _json({"error": "You already created this model repo", "url": f"{self.endpoint}/{name}"}, 409)
            self.repositories[name] = [{}]
            return _json({"url": f"{self.endpoint}/{name}", "name": name, "id": "1"})
        if path == "/api/validate-yaml":
            return _json({"errors": [], "warnings": []})
        if path.startswith("/api/models/"):
            owner, name, *rest = path.removeprefix("/api/models/").split("/")
            return self._model(f"{owner}/{name}", rest, body)
        if "/resolve/" in path:
            repository, _, rest = path[1:].partition("/resolve/")
            revision, _, file = rest.partition("/")
            return self._file(repository, revision, file)
        return _json({"error": "not found"}, 404)

    def _model(self, repository: str, rest: list[str], body: bytes) -> tuple[int, dict[str, str], bytes]:
        if repository not in self.repositories:
            return _json({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        what, revision = (rest[0], rest[1]) if rest else ("revision", "main")
        commit = self._commit(repository, revision)
        if commit is None:
            return _json({"error": f"Invalid rev id: {revision}"}, 404, {"X-Error-Code": "RevisionNotFound"})
        number, files = commit
        if what == "revision":
            facts = {
                "_id": "1",
                "id": repository,
                "modelId": repository,
                "sha": _sha(repository, number),
                "private": False,
            }
            return _json(facts | {"siblings": [{"rfilename": file} for file in files]})
        if what == "tree":
            return _json([{"type": "file", "path": f, "size": len(c), "oid": _oid(c)} for f, c in files.items()])
        if what == "preupload":
            asked = [file["path"] for file in json.loads(body)["files"]]
            return _json({"files": [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in asked]})
        if what == "commit":
            new = dict(files)
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "header":
                    self.messages.append(entry["value"]["summary"])
                else:
                    assert entry["key"] == "file", entry["key"]
                    new[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            self.repositories[repository].append(new)
            sha = _sha(repository, len(self.repositories[repository]) - 1)
            url = f"{self.endpoint}/{repository}/commit/{sha}"
            return _json({"success": True, "commitOid": sha, "commitUrl": url, "hookOutput": ""})
        return _json({"error": what}, 404)

    def _commit(self, repository: str, revision: str) -> tuple[int, dict[str, bytes]] | None:
        commits = self.repositories[repository]
        if revision == "main":
            return len(commits) - 1, commits[-1]
        for number, files in enumerate(commits):
            if revision == _sha(repository, number):
                return number, files
        return None

    def _file(self, repository: str, revision: str, file: str) -> tuple[int, dict[str, str], bytes]:
        found = self._commit(repository, revision) if repository in self.repositories else None
        if found is None or file not in found[1]:
            return _json({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
        number, files = found
        content = files[file]
        return 200, {"X-Repo-Commit": _sha(repository, number), "ETag": f'"{_oid(content)}"'}, content


def _json(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> tuple[int, dict[str, str], bytes]:
    return status, {"Content-Type": "application/json", **(headers or {})}, json.dumps(value).encode()


def _sha(repository: str, number: int) -> str:
    return hashlib.sha1(f"{repository}@{number}".encode(), usedforsecurity=False).hexdigest()


def _oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
