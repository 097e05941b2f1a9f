"""A small model hub on 127.0.0.1: real HTTP, real files, the protocol of huggingface.co as its client speaks it.

It answers `/api/models…` and `/{repo}/resolve/{revision}/{file}`, keeps weights on a "CDN" under another host name
(as the real hub does, so that a token leaking to it shows), honours Range, logs every request, and can cut a transfer
in the middle. It also answers as an HTTP proxy for the pages in `web`.
"""

import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

LFS_SUFFIXES = (".safetensors", ".bin", ".h5", ".msgpack")
CHUNK_BYTES = 1 << 16


@dataclass
class Request:
    """One request as it was answered; `num_bytes` is what has gone over the wire as body."""

    method: str
    path: str
    host: str
    range: str | None
    token: str | None
    status: int
    num_bytes: int


@dataclass
class Repo:
    info: dict[str, Any]
    gated: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)  # commit → file name → content
    revisions: dict[str, str] = field(default_factory=dict)  # branch or tag → commit


class HubServer:
    """`with HubServer() as hub: hub.add("me/model", {"config.json": b"{}"})`; a client has HF_ENDPOINT=hub.endpoint."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.web: dict[str, bytes] = {}  # url → body, answered when used as a proxy
        self.requests: list[Request] = []
        self.tokens: set[str] = set()  # those with access to gated repos
        self.broken_status: int | None = None  # answer everything with this status, e.g. 503
        self._cuts: dict[str, list[int]] = {}
        self._status_after_cut: int | None = None
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.daemon_threads = True
        self._server.hub = self  # type: ignore[attr-defined]
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    def __enter__(self) -> "HubServer":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Close the port: from now on a client's connection is refused. Harmless when already stopped."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
        self._server.server_close()

    @property
    def port(self) -> int:
        return self._server.server_address[1]

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def add(
        self,
        repo_id: str,
        files: dict[str, bytes] | Path,
        *,
        revision: str = "main",
        gated: bool = False,
        **info: Any,
    ) -> str:
        """Commit `files` (or every file of a folder) as `revision` of a repo; returns the commit hash.

        `info` is what the listing says of it: tags, downloads, likes, pipeline_tag.
        """
        if isinstance(files, Path):
            files = {p.relative_to(files).as_posix(): p.read_bytes() for p in files.rglob("*") if p.is_file()}
        digest = hashlib.sha1(repo_id.encode())
        for name in sorted(files):
            digest.update(name.encode() + b"\0" + files[name])
        commit = digest.hexdigest()
        repo = self.repos.setdefault(repo_id, Repo({"tags": [], "downloads": 0, "likes": 0}, gated))
        repo.info |= info
        repo.commits[commit] = files
        repo.revisions[revision] = commit
        return commit

    def cut(self, name: str, *after_bytes: int, then_status: int | None = None) -> None:
        """Cut the next transfers of file `name`, one per number, after that many bytes of body; with `then_status`
        the hub is broken from the cut on, as in `broken_status`."""
        self._cuts[name] = list(after_bytes)
        self._status_after_cut = then_status

    def bodies(self, name: str) -> list[Request]:
        """GET requests that carried bytes of the file `name`, or tried to."""
        return [
            r for r in self.requests if r.method == "GET" and r.path.endswith(f"/{name}") and r.status in (200, 206)
        ]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def hub(self) -> HubServer:
        return self.server.hub  # type: ignore[attr-defined]

    def log_message(self, format: str, *args: Any) -> None:
        pass  # kept in `hub.requests` instead

    def do_HEAD(self) -> None:
        self._route()

    def do_GET(self) -> None:
        self._route()

    def _route(self) -> None:
        if self.hub.broken_status is not None:
            return self._fail(self.hub.broken_status, "", "out of order")
        if self.path in self.hub.web:
            return self._reply(200, self.hub.web[self.path], {"Content-Type": "image/png"})
        url = urlsplit(self.path)
        parts = [unquote(part) for part in url.path.strip("/").split("/")]
        if parts[:2] == ["api", "models"]:
            return self._list(parse_qs(url.query)) if len(parts) == 2 else self._api(parts[2:])
        if parts[0] == "cdn":
            return self._cdn(parts[1], parts[2])
        if "resolve" in parts[1:-2]:
            at = parts.index("resolve", 1)
            return self._resolve("/".join(parts[:at]), parts[at + 1], "/".join(parts[at + 2 :]))
        return self._fail(404, "", f"no such page: {self.path}")

    def _open(self, repo_id: str, revision: str, *, content: bool) -> tuple[str, dict[str, bytes]] | None:
        """(commit, files), or None after the hub's refusal was sent. Gating guards content, not the listing."""
        repo = self.hub.repos.get(repo_id)
        if repo is None:  # the real hub says 401, so as not to tell missing from private
            self._fail(401, "RepoNotFound", "Invalid username or password.")
            return None
        if content and repo.gated and (token := self._token()) not in self.hub.tokens:
            self._fail(401 if token is None else 403, "GatedRepo", f"Access to model {repo_id} is restricted.")
            return None
        commit = repo.revisions.get(revision, revision)
        if commit not in repo.commits:
            self._fail(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return None
        return commit, repo.commits[commit]

    def _token(self) -> str | None:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None

    def _resolve(self, repo_id: str, revision: str, name: str) -> None:
        found = self._open(repo_id, revision, content=True)
        if found is None:
            return None
        commit, files = found
        if name not in files:
            return self._fail(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": commit})
        content, headers = files[name], {"X-Repo-Commit": commit}
        if not name.endswith(LFS_SUFFIXES):
            git_sha1 = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            return self._reply(200, content, headers | {"ETag": f'"{git_sha1}"'}, name)
        sha256 = hashlib.sha256(content).hexdigest()
        headers |= {"X-Linked-Size": str(len(content)), "X-Linked-Etag": f'"{sha256}"'}
        return self._reply(
            302, b"", headers | {"Location": f"http://localhost:{self.hub.port}/cdn/{sha256}/{name.split('/')[-1]}"}
        )

    def _cdn(self, sha256: str, name: str) -> None:
        for repo in self.hub.repos.values():
            for files in repo.commits.values():
                for content in files.values():
                    if hashlib.sha256(content).hexdigest() == sha256:
                        return self._reply(200, content, {"ETag": f'"{sha256}"'}, name)
        return self._fail(404, "", "no such object")

    def _api(self, parts: list[str]) -> None:
        repo_id, _, rest = "/".join(parts).partition("/revision/")
        if repo_id.endswith("/refs"):
            repo_id = repo_id.removesuffix("/refs")
            repo = self.hub.repos[repo_id]
            branches = [
                {"name": name, "ref": f"refs/heads/{name}", "targetCommit": commit}
                for name, commit in repo.revisions.items()
            ]
            return self._json({"branches": branches, "tags": [], "converts": []})
        found = self._open(repo_id, rest or "main", content=False)
        if found is None:
            return None
        commit, files = found
        info = {"id": repo_id, "sha": commit, "siblings": [{"rfilename": name} for name in files]}
        return self._json(self.hub.repos[repo_id].info | info)

    def _list(self, query: dict[str, list[str]]) -> None:
        search = query.get("search", [""])[0].lower()
        found = [
            {"id": name, "gated": "auto" if repo.gated else False, **repo.info}
            for name, repo in self.hub.repos.items()
            if search in name.lower()
            and set(query.get("filter", [])) <= set(repo.info["tags"])
            and query.get("pipeline_tag", [repo.info.get("pipeline_tag")])[0] == repo.info.get("pipeline_tag")
            and query.get("gated", [str(repo.gated)])[0].lower() == str(repo.gated).lower()
        ]
        found.sort(key=lambda model: -model["downloads"])
        return self._json(found[: int(query.get("limit", ["1000"])[0])])

    def _json(self, value: Any) -> None:
        self._reply(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _fail(self, status: int, code: str, message: str, headers: dict[str, str] | None = None) -> None:
        headers = (headers or {}) | ({"X-Error-Code": code} if code else {}) | {"X-Error-Message": message}
        self._reply(status, json.dumps({"error": message}).encode(), headers)

    def _reply(self, status: int, body: bytes, headers: dict[str, str], name: str = "") -> None:
        """Send it, or with Range the rest of it; `name` is the file whose transfer may be cut."""
        asked = self.headers.get("Range")
        start = 0
        if status == 200 and asked and name:
            start = int(asked.removeprefix("bytes=").split("-")[0])
            status, headers = 206, headers | {"Content-Range": f"bytes {start}-{len(body) - 1}/{len(body)}"}
        rest = memoryview(body)[start:]
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(rest)))
        self.end_headers()
        cuts = self.hub._cuts.get(name) if self.command == "GET" else None
        stop = min(cuts.pop(0), len(rest)) if cuts else len(rest)
        host = self.headers.get("Host") or ""
        request = Request(self.command, self.path, host, asked, self._token(), status, 0)
        self.hub.requests.append(request)
        try:
            while self.command == "GET" and request.num_bytes < stop:
                at = request.num_bytes
                request.num_bytes += self.wfile.write(rest[at : min(at + CHUNK_BYTES, stop)])
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True  # the client went away
        if stop < len(rest) and self.command == "GET":
            self.hub.broken_status = self.hub._status_after_cut
            self.close_connection = True  # shorter than its Content-Length: the client sees a cut transfer
