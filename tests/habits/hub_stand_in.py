"""A stand-in for the model hub on 127.0.0.1, and a process that talks to it and to nothing else.

It serves what `huggingface_hub` asks for while models and tokenizers load: information about a repository, the list of
its files, and the files, by branch, tag or commit, small ones as they are and weights by a redirect.
"""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit


@dataclass
class Repository:
    """Directories by commit, commits by branch or tag."""

    commits: dict[str, Path] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    token: str | None = None  # without it the repository is not there
    gated: bool = False  # nobody has been let in
    broken: str | None = None  # "status 503", "truncated"

    def add(self, directory: Path, *names: str) -> str:
        """A commit of the directory's files, under these branches or tags."""
        commit = hashlib.sha1(f"{directory} {len(self.commits)}".encode()).hexdigest()
        self.commits[commit] = directory
        self.names |= dict.fromkeys(names, commit)
        return commit


class Hub(ThreadingHTTPServer):
    """The server: its repositories by id, and the requests it got, `METHOD /path` with the token they carried."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, Repository] = {}
        self.requests: list[str] = []
        self.tokens: set[str | None] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def add(self, name: str, directory: Path | None = None, **kwargs: Any) -> Repository:
        repository = self.repositories[name] = Repository(**kwargs)
        if directory is not None:
            repository.add(directory, "main")
        return repository

    def files(self, name: str) -> set[str]:
        """The files of a repository that were asked for."""
        wanted = [request.split()[1] for request in self.requests if f"/{name}/resolve/" in request]
        return {path.split("/resolve/", 1)[1].partition("/")[2] for path in wanted}


class Handler(BaseHTTPRequestHandler):
    """One request; `protocol_version` stays 1.0, so that each ends its connection."""

    server: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append(f"{self.command} {path}")
        self.server.tokens.add(self.headers.get("Authorization"))
        name, action, rest = _parts(path)
        repository = self.server.repositories.get(name)
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if repository is None or repository.token not in (None, token):
            self._fail(401, "RepoNotFound")
            return
        revision, _, file = rest.partition("/")
        commit = repository.names.get(revision, revision)
        if (repository.broken or "").startswith("status"):
            self._fail(int(repository.broken.split()[1]), None)
        elif repository.gated and action != "info":
            self._fail(403, "GatedRepo")
        elif commit not in repository.commits:
            self._fail(404, "RevisionNotFound")
        else:
            self._serve(repository, action, name, commit, file)

    def _serve(self, repository: Repository, action: str, name: str, commit: str, file: str) -> None:
        directory = repository.commits[commit]
        listed = {str(path.relative_to(directory)): path for path in directory.rglob("*") if path.is_file()}
        if action == "info":
            siblings = [{"rfilename": entry} for entry in listed]
            self._json({"id": name, "modelId": name, "sha": commit, "siblings": siblings, "private": False})
        elif action in ("commits", "discussions"):  # transformers looks for converted weights in pull requests
            self._json([] if action == "commits" else {"discussions": [], "count": 0, "start": 0})
        elif action == "tree":
            inside = {entry: path for entry, path in listed.items() if entry.startswith(f"{file}/" if file else "")}
            if file and not inside:
                self._fail(404, "EntryNotFound")
            else:
                self._json([_entry(entry, path) for entry, path in inside.items()])
        elif file not in listed:
            self._fail(404, "EntryNotFound", commit)
        else:
            self._file(repository, action, name, commit, file, listed[file])

    def _file(self, repository: Repository, action: str, name: str, commit: str, file: str, path: Path) -> None:
        data = path.read_bytes()
        large = file.endswith((".safetensors", ".bin", ".gguf"))
        headers = {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha256(data).hexdigest()}"'}
        if large and action == "resolve":
            headers |= {"X-Linked-ETag": headers["ETag"], "X-Linked-Size": str(len(data))}
            self._send(302, b"", headers | {"Location": f"{self.server.url}/{name}/store/{commit}/{file}"})
        elif large and repository.broken == "truncated":
            self._send(200, data[: len(data) // 2], headers, length=len(data))
        else:
            self._send(200, data, headers)

    def _json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _fail(self, status: int, code: str | None, commit: str | None = None) -> None:
        headers = {"X-Error-Code": code, "X-Repo-Commit": commit}
        self._send(status, b"", {key: value for key, value in headers.items() if value})

    def _send(self, status: int, data: bytes, headers: dict[str, str], length: int | None = None) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data) if length is None else length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def _parts(path: str) -> tuple[str, str, str]:
    """Repository, action ("info", "tree", "resolve", "store"), and revision with file."""
    pieces = path.strip("/").split("/")
    if pieces[:2] == ["api", "models"]:
        name, rest = "/".join(pieces[2:4]), pieces[4:]
        if not rest:
            return name, "info", "main"
        return name, "info" if rest[0] == "revision" else rest[0], "/".join(rest[1:])
    return "/".join(pieces[:2]), pieces[2] if len(pieces) > 2 else "", "/".join(pieces[3:])


def _entry(name: str, path: Path) -> dict[str, object]:
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return {"type": "file", "path": name, "size": path.stat().st_size, "oid": digest[:40]}


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A hub that serves until the block ends."""
    with Hub() as hub:
        threading.Thread(target=hub.serve_forever, args=(0.05,), daemon=True).start()
        yield hub
        hub.shutdown()


# What a worker runs: one JSON line per order, one per answer. `result` is what the code leaves under that name.
_WORKER = """
import contextlib, io, json, sys, warnings
events = []
def hook(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn"):
        events.append(f"{event} {arguments[1:]}"[:200])
sys.addaudithook(hook)
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, pipeline
import nemotron_h
from nemotron_h import LLM, NemotronHConfig, NemotronHForCausalLM, NemotronHModel, SamplingParams
from nemotron_h.cli import main
torch.set_num_threads(1)
nemotron_h.register()
answers, sys.stdout = sys.stdout, sys.stderr
for line in sys.stdin:
    events.clear()
    names, answer, out, err = dict(globals()), {}, io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            exec(json.loads(line), names)
            answer["result"] = names.get("result")
        except Exception as error:
            answer["error"] = [cls.__name__ for cls in type(error).__mro__]
            answer["message"] = str(error)
    answer |= {"out": out.getvalue(), "err": err.getvalue(), "events": list(events)}
    print(json.dumps(answer), file=answers, flush=True)
"""


class Worker:
    """A process with a hub's address, a cache of its own, and our classes registered."""

    def __init__(self, home: Path, url: str, **environment: str) -> None:
        kept = {
            key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING", "TRANSFORMERS"))
        }
        own = {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-c", _WORKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, env=kept | own | {"NO_PROXY": "127.0.0.1"} | environment,
        )  # fmt: skip
        self._log: list[str] = []
        threading.Thread(target=lambda: self._log.extend(self._process.stderr or ()), daemon=True).start()

    def ask(self, code: str) -> dict[str, Any]:
        """Runs the code; the answer has `result`, or `error` (names of its classes) and `message`."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(code), file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        assert answer, "".join(self._log)
        return json.loads(answer)

    def result(self, code: str) -> Any:
        answer = self.ask(code)
        assert "error" not in answer, answer["message"]
        return answer["result"]

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)
