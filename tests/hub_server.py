"""A small Hub on loopback for huggingface_hub's real client: repositories, commits, LFS storage, faults on demand.

What it promises is what the Hub promises: a stored object has the SHA-256 and the size that were announced, a commit
happens as a whole or not at all, and what arrived is not asked for again. Everything lies on disk, under `root`:

    objects/<sha256>      LFS objects          blobs/<git id>    other files          repos/<owner>/<name>.json

LFS objects are served by a redirect to another host name, as by a content network, which must never see a token.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import yaml


READ_TOKEN, WRITE_TOKEN = "hf_" + "r" * 34, "hf_" + "w" * 34
OWNER = "someone"
# Larger files, and those of such names, go to LFS, as the Hub's default .gitattributes has it.
LFS_SUFFIXES = (".safetensors", ".bin", ".model", ".pt", ".gguf", ".zip")
LFS_BYTES = 10 * 2**20
PIPELINES = {"image-text-to-text", "image-feature-extraction", "text-generation", "any-to-any"}
LICENSES = {"apache-2.0", "mit", "llama2", "llama3", "cc-by-nc-4.0", "other", "unknown"}
REPO_ID = re.compile(r"(?!-)[\w.-]+(?<!-)(/(?!-)[\w.-]+(?<!-))?")
PAGE = 1000


@dataclass
class Fault:
    """What goes wrong at requests that match, the first `times` times.

    Attributes:
        method, path: regular expressions; the path is without its query.
        status: answers with this code instead of doing anything.
        drop_after: reads (uploads) or writes (downloads) so many bytes, then closes the connection.
        corrupt: flips a bit of what is sent back.
        cut: sends back so many bytes, as if that were all.
        headers: are sent back in the place of those of the same names.
        skip: lets so many matching requests pass first.
    """

    method: str
    path: str
    times: int = 1
    status: int | None = None
    drop_after: int | None = None
    corrupt: bool = False
    cut: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    skip: int = 0


@dataclass
class Request:
    """A request that arrived, with headers under lower-case names and the bytes of its body and of its answer's."""

    method: str
    path: str
    headers: dict[str, str]
    status: int = 0
    received: int = 0
    sent: int = 0


class HubError(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, message: str, code: str | None = None, body: dict | None = None):
        super().__init__(message)
        self.status, self.code, self.body = status, code, body or {"error": message}


@dataclass
class HubServer:
    """The server; use it as `with HubServer(folder).run() as hub`.

    Attributes:
        root: where everything is stored.
        requests: every request so far.
        faults: what shall go wrong.
    """

    root: Path
    requests: list[Request] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    lock: threading.RLock = field(default_factory=threading.RLock)

    @contextmanager
    def run(self):
        for name in ("objects", "blobs", "repos"):
            (self.root / name).mkdir(parents=True, exist_ok=True)
        server = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": self}))
        server.daemon_threads = True
        self.port = server.server_port
        self.endpoint = f"http://127.0.0.1:{self.port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()
            thread.join()

    def environment(self, home: Path, **more: str) -> dict[str, str]:
        """Variables that point huggingface_hub here, with caches of their own and no other token than `HF_TOKEN`."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
        } | more

    def uploaded(self) -> int:
        """Bytes of LFS objects that were received in full or in part."""
        return sum(request.received for request in self.requests if request.method == "PUT")

    # ---- repositories

    def read_repo(self, repo_id: str) -> dict:
        path = self.root / "repos" / f"{repo_id}.json"
        if not path.is_file():
            raise HubError(404, "Repository not found", "RepoNotFound")
        return json.loads(path.read_text())

    def write_repo(self, repo_id: str, repo: dict):
        path = self.root / "repos" / f"{repo_id}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(".draft")
        draft.write_text(json.dumps(repo))
        draft.rename(path)

    def make_repo(self, repo_id: str, private: bool = False):
        repo = {"private": private, "refs": {}, "commits": {}, "pulls": 0}
        content = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
        oid = hash_blob(content)
        (self.root / "blobs" / oid).write_bytes(content)
        files = {".gitattributes": {"oid": oid, "size": len(content)}}
        repo["refs"]["main"] = self.add_commit(repo, None, files, "initial commit")
        self.write_repo(repo_id, repo)

    def find_commit(self, repo: dict, revision: str) -> str:
        revision = repo["refs"].get(revision, revision)
        if revision not in repo["commits"]:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return revision

    def list_files(self, repo_id: str, revision: str = "main") -> dict[str, dict]:
        repo = self.read_repo(repo_id)
        return repo["commits"][self.find_commit(repo, revision)]["files"]

    def read_file(self, repo_id: str, name: str, revision: str = "main") -> bytes:
        return self.locate(self.list_files(repo_id, revision)[name]).read_bytes()

    def locate(self, entry: dict) -> Path:
        return self.root / "objects" / entry["sha256"] if "sha256" in entry else self.root / "blobs" / entry["oid"]

    def add_commit(self, repo: dict, parent: str | None, files: dict, title: str) -> str:
        content = json.dumps([parent, files, title, len(repo["commits"])])
        commit = hashlib.sha1(content.encode()).hexdigest()
        repo["commits"][commit] = {"parent": parent, "files": files, "title": title}
        return commit


def hash_blob(content: bytes) -> str:
    """The id that git gives a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def validate_card(content: str) -> tuple[list[str], list[str]]:
    """Errors and warnings of a card's metadata, as far as they concern models."""
    match = re.match(r"---\r?\n(.*?)\r?\n---(\r?\n|$)", content, re.DOTALL)
    if not match:
        return [], ["empty or missing yaml metadata in repo card"]
    try:
        data = yaml.safe_load(match[1])
    except yaml.YAMLError as error:
        return [f"YAML: {error}"], []
    if not isinstance(data, dict):
        return ["metadata must be a mapping"], []
    errors = []
    for key in ("tags", "datasets", "base_model", "language", "metrics"):
        values = data.get(key, [])
        values = [values] if isinstance(values, str) else values
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            errors.append(f'"{key}" must be a string or a list of strings')
        elif key in ("datasets", "base_model"):
            errors += [
                f'"{key}[{i}]" is no id: {value}' for i, value in enumerate(values) if not REPO_ID.fullmatch(value)
            ]
    if "license" in data and data["license"] not in LICENSES:
        errors.append(f'"license" must be one of {sorted(LICENSES)}')
    if data.get("license") == "other" and not data.get("license_name"):
        errors.append('"license_name" is required with license: other')
    if "pipeline_tag" in data and data["pipeline_tag"] not in PIPELINES:
        errors.append(f'"pipeline_tag" must be one of {sorted(PIPELINES)}')
    if not isinstance(data.get("library_name", ""), str):
        errors.append('"library_name" must be a string')
    for i, model in enumerate(data.get("model-index", [])):
        if not isinstance(model.get("name"), str) or not isinstance(model.get("results"), list):
            errors.append(f'"model-index[{i}]" needs a name and results')
            continue
        for j, result in enumerate(model["results"]):
            where = f'"model-index[{i}].results[{j}]'
            for path in (("task", "type"), ("dataset", "type"), ("dataset", "name")):
                if not isinstance(result.get(path[0], {}).get(path[1]), str):
                    errors.append(f'{where}.{".".join(path)}" is required')
            for metric in result.get("metrics") or [{}]:
                if not isinstance(metric.get("type"), str) or metric.get("value") is None:
                    errors.append(f'{where}.metrics" need a type and a value')
            if "source" in result and not str(result["source"].get("url", "")).startswith("https://"):
                errors.append(f'{where}.source.url" must be a URL')
    return errors, []


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    hub: HubServer
    protocol_version = "HTTP/1.1"
    wbufsize = -1

    def log_message(self, *arguments):
        pass

    def handle_any(self):
        parts = urlsplit(self.path)
        self.query = parse_qs(parts.query)
        path = unquote(parts.path)
        self.request_entry = Request(self.command, path, {key.lower(): value for key, value in self.headers.items()})
        self.fault = None
        with self.hub.lock:
            self.hub.requests.append(self.request_entry)
            for fault in self.hub.faults:
                if fault.times and re.fullmatch(fault.method, self.command) and re.fullmatch(fault.path, path):
                    if fault.skip:
                        fault.skip -= 1
                        continue
                    fault.times -= 1
                    self.fault = fault
                    break
        try:
            if self.command == "PUT":
                self.put_object(path)
                return
            self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.request_entry.received = len(self.body)
            if self.fault and self.fault.status:
                raise HubError(self.fault.status, "a fault on demand")
            if self.fault and self.fault.drop_after is not None and self.command == "POST":
                raise ConnectionError
            for method, pattern, handler in ROUTES:
                # Slashes inside a revision are encoded, so the path is matched before it is decoded.
                if self.command in method.split("|") and (match := re.fullmatch(pattern, parts.path)):
                    groups = {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
                    handler(self, **groups)
                    return
            raise HubError(404, f"no route {self.command} {path}")
        except HubError as error:
            self.answer(error.body, error.status, {"X-Error-Code": error.code, "X-Error-Message": str(error)})
        except ConnectionError:
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_any

    def answer(self, body, status: int = 200, headers: dict | None = None):
        content = json.dumps(body).encode()
        self.send_content(content, status, {"Content-Type": "application/json", **(headers or {})})

    def send_content(self, content: bytes, status: int, headers: dict):
        self.request_entry.status = status
        if self.fault:
            headers, content = {**headers, **self.fault.headers}, content[: self.fault.cut]
        self.send_response(status)
        for key, value in headers.items():
            if value is not None:
                self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            if self.fault and self.fault.corrupt and content:
                content = content[:-1] + bytes([content[-1] ^ 1])
            if self.fault and self.fault.drop_after is not None:
                content = content[: self.fault.drop_after]
                self.close_connection = True
            self.wfile.write(content)
            self.request_entry.sent = len(content)

    # ---- who may do what

    def authorize(self, repo_id: str | None = None, write: bool = False):
        given = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if given and given not in (READ_TOKEN, WRITE_TOKEN):
            raise HubError(401, "Invalid credentials in Authorization header")
        if write and not given:
            raise HubError(401, "Invalid username or password.")
        is_own = (repo_id or OWNER).split("/")[0] == OWNER
        # Everybody may send objects and propose changes to a public repository.
        is_proposal = self.query.get("create_pr") == ["1"] or ".git/info/lfs/" in self.path
        if write and (given != WRITE_TOKEN or not (is_own or is_proposal)):
            raise HubError(403, "You don't have the rights to write to this repository with this token")
        if repo_id and not write and not given and self.hub.read_repo(repo_id)["private"]:
            raise HubError(401, "Repository not found", "RepoNotFound")

    # ---- routes

    def whoami(self):
        self.authorize()
        if not self.headers.get("Authorization"):
            raise HubError(401, "Invalid username or password.")
        self.answer({"type": "user", "name": OWNER, "auth": {"accessToken": {"role": "write"}}, "orgs": []})

    def create_repo(self):
        settings = json.loads(self.body)
        repo_id = f"{settings.get('organization') or OWNER}/{settings['name']}"
        self.authorize(repo_id, write=True)
        url = {"url": f"{self.hub.endpoint}/{repo_id}", "name": repo_id}
        with self.hub.lock:
            if (self.hub.root / "repos" / f"{repo_id}.json").is_file():
                raise HubError(409, "You already created this model repo", body={**url, "error": "it exists"})
            self.hub.make_repo(repo_id, settings.get("visibility") == "private" or settings.get("private") is True)
        self.answer(url)

    def validate_yaml(self):
        errors, warnings = validate_card(json.loads(self.body)["content"])
        body = {"errors": [{"message": text} for text in errors], "warnings": [{"message": text} for text in warnings]}
        self.answer(body, 400 if errors else 200)

    def preupload(self, repo_id: str, revision: str):
        self.authorize(repo_id, write=True)
        known = self.hub.list_files(repo_id, revision)
        files = []
        for file in json.loads(self.body)["files"]:
            is_lfs = file["path"].endswith(LFS_SUFFIXES) or file["size"] > LFS_BYTES
            entry = known.get(file["path"], {})
            oid = entry.get("sha256") or entry.get("oid")
            mode = "lfs" if is_lfs and file["size"] else "regular"
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.answer({"files": files})

    def batch(self, repo_id: str):
        self.authorize(repo_id, write=True)
        objects = []
        for item in json.loads(self.body)["objects"]:
            stored = self.hub.root / "objects" / item["oid"]
            if not (stored.is_file() and stored.stat().st_size == item["size"]):
                href = f"{self.hub.endpoint}/lfs/{item['oid']}?size={item['size']}&signature=s"
                verify = {"href": f"{self.hub.endpoint}/{repo_id}.git/info/lfs/verify"}
                item = {**item, "actions": {"upload": {"href": href}, "verify": verify}}
            objects.append(item)
        self.answer({"transfer": "basic", "objects": objects})

    def put_object(self, path: str):
        """Stores an LFS object as it arrives; only one that is right and whole gets its name."""
        sha256, left = path.rsplit("/", 1)[-1], int(self.headers["Content-Length"])
        draft = self.hub.root / "objects" / f"{sha256}.{threading.get_ident()}.part"
        digest, limit = hashlib.sha256(), self.fault.drop_after if self.fault else None
        try:
            with open(draft, "wb") as file:
                while left:
                    block = self.rfile.read(min(left, 2**16))
                    if not block:
                        raise ConnectionError
                    left -= len(block)
                    self.request_entry.received += len(block)
                    digest.update(block)
                    file.write(block)
                    if limit is not None and self.request_entry.received >= limit:
                        raise ConnectionError
            if self.fault and self.fault.status:
                raise HubError(self.fault.status, "a fault on demand")
            wrong = digest.hexdigest() != sha256 or (self.fault and self.fault.corrupt)
            if wrong or draft.stat().st_size != int(self.query["size"][0]):
                raise HubError(400, "the content has another SHA-256 or size than announced")
            draft.rename(self.hub.root / "objects" / sha256)
            self.answer({}, headers={"ETag": f'"{sha256}"'})
        finally:
            draft.unlink(missing_ok=True)

    def verify(self, repo_id: str):
        self.authorize(repo_id, write=True)
        item = json.loads(self.body)
        stored = self.hub.root / "objects" / item["oid"]
        if not stored.is_file() or stored.stat().st_size != item["size"]:
            raise HubError(400, "the object did not arrive")
        self.answer({})

    def commit(self, repo_id: str, revision: str):
        """Applies all operations to a copy of the tree and then moves the branch: all of it or nothing."""
        self.authorize(repo_id, write=True)
        lines = [json.loads(line) for line in self.body.splitlines() if line]
        header = next(line["value"] for line in lines if line["key"] == "header")
        with self.hub.lock:
            repo = self.hub.read_repo(repo_id)
            parent = self.hub.find_commit(repo, revision)
            if header.get("parentCommit") not in (None, parent):
                raise HubError(412, "A commit has happened since. Please refresh and try again.")
            files = dict(repo["commits"][parent]["files"])
            for line in lines:
                value = line["value"]
                if line["key"] == "file":
                    content = base64.b64decode(value["content"])
                    oid = hash_blob(content)
                    (self.hub.root / "blobs" / oid).write_bytes(content)
                    files[value["path"]] = {"oid": oid, "size": len(content)}
                elif line["key"] == "lfsFile":
                    stored = self.hub.root / "objects" / value["oid"]
                    if not stored.is_file():
                        raise HubError(400, f"LFS object {value['oid']} of {value['path']} was never uploaded")
                    size = stored.stat().st_size
                    pointer = f"oid sha256:{value['oid']}\nsize {size}\n".encode()
                    files[value["path"]] = {"oid": hash_blob(pointer), "size": size, "sha256": value["oid"]}
                elif line["key"] in ("deletedFile", "deletedFolder"):
                    gone = [name for name in files if name == value["path"] or name.startswith(value["path"] + "/")]
                    if not gone:
                        raise HubError(404, "A file with this name doesn't exist", "EntryNotFound")
                    for name in gone:
                        del files[name]
            commit = self.hub.add_commit(repo, parent, files, header["summary"])
            pull = None
            if self.query.get("create_pr") == ["1"]:
                repo["pulls"] += 1
                repo["refs"][f"refs/pr/{repo['pulls']}"] = commit
                pull = f"{self.hub.endpoint}/{repo_id}/discussions/{repo['pulls']}"
            else:
                repo["refs"][revision] = commit
            self.hub.write_repo(repo_id, repo)
        url = f"{self.hub.endpoint}/{repo_id}/commit/{commit}"
        self.answer({"success": True, "commitOid": commit, "commitUrl": url, "pullRequestUrl": pull})

    def create_ref(self, repo_id: str, revision: str, kind: str):
        self.authorize(repo_id, write=True)
        body = json.loads(self.body or b"{}")
        with self.hub.lock:
            repo = self.hub.read_repo(repo_id)
            name = body["tag"] if kind == "tag" else revision
            if name in repo["refs"]:
                raise HubError(409, "Reference already exists")
            start = revision if kind == "tag" else body.get("startingPoint") or "main"
            repo["refs"][name] = self.hub.find_commit(repo, start)
            self.hub.write_repo(repo_id, repo)
        self.answer({})

    def info(self, repo_id: str, revision: str = "main"):
        self.authorize(repo_id)
        repo = self.hub.read_repo(repo_id)
        commit = self.hub.find_commit(repo, revision)
        siblings = [{"rfilename": name, **describe(entry)} for name, entry in repo["commits"][commit]["files"].items()]
        body = {"_id": repo_id, "id": repo_id, "modelId": repo_id, "sha": commit, "private": repo["private"]}
        self.answer({**body, "tags": [], "downloads": 0, "likes": 0, "siblings": siblings})

    def tree(self, repo_id: str, revision: str, folder: str = ""):
        self.authorize(repo_id)
        files = self.hub.list_files(repo_id, revision)
        found = {name: entry for name, entry in files.items() if name.startswith(folder and f"{folder}/")}
        if folder and not found:
            raise HubError(404, f'"{folder}" does not exist on "{revision}"', "EntryNotFound")
        entries = []
        for name, entry in sorted(found.items()):
            if self.query.get("recursive", ["false"])[0].lower() == "true" or "/" not in name[len(folder) + 1 :]:
                entries.append({"type": "file", "path": name, **describe(entry)})
        start = int(self.query.get("cursor", ["0"])[0])
        link = None
        if len(entries) > start + PAGE:
            url = f"{self.hub.endpoint}{urlsplit(self.path).path}"
            link = f'<{url}?recursive={self.query.get("recursive", ["false"])[0]}&cursor={start + PAGE}>; rel="next"'
        self.answer(entries[start : start + PAGE], headers={"Link": link})

    def paths_info(self, repo_id: str, revision: str):
        self.authorize(repo_id)
        kind = self.headers.get("Content-Type", "")
        paths = json.loads(self.body)["paths"] if "json" in kind else parse_qs(self.body.decode())["paths"]
        files = self.hub.list_files(repo_id, revision)
        self.answer([{"type": "file", "path": path, **describe(files[path])} for path in paths if path in files])

    def resolve(self, repo_id: str, revision: str, name: str):
        self.authorize(repo_id)
        repo = self.hub.read_repo(repo_id)
        commit = self.hub.find_commit(repo, revision)
        headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        entry = repo["commits"][commit]["files"].get(name)
        if entry is None:
            self.answer({"error": "Entry not found"}, 404, {**headers, "X-Error-Code": "EntryNotFound"})
        elif "sha256" in entry:
            headers["X-Linked-Etag"] = f'"{entry["sha256"]}"'
            headers["X-Linked-Size"] = str(entry["size"])
            headers["Location"] = f"http://localhost:{self.hub.port}/cdn/{entry['sha256']}?signature=s"
            self.send_content(b"", 302, headers)
        else:
            self.send_file(self.hub.locate(entry), {**headers, "ETag": f'"{entry["oid"]}"'})

    def serve_object(self, sha256: str):
        if self.headers.get("Authorization"):
            raise HubError(400, "a token came to the content network")
        self.send_file(self.hub.root / "objects" / sha256, {"ETag": f'"{sha256}"', "Accept-Ranges": "bytes"})

    def send_file(self, path: Path, headers: dict):
        content, status = path.read_bytes(), 200
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            start, end = int(match[1]), int(match[2] or len(content) - 1)
            if start >= len(content):
                raise HubError(416, "the range is beyond the file")
            headers["Content-Range"] = f"bytes {start}-{min(end, len(content) - 1)}/{len(content)}"
            content, status = content[start : end + 1], 206
        self.send_content(content, status, headers)


def describe(entry: dict) -> dict:
    """An entry of a tree, as the Hub writes it."""
    described = {"oid": entry["oid"], "blobId": entry["oid"], "size": entry["size"]}
    if "sha256" in entry:
        lfs = {"oid": entry["sha256"], "sha256": entry["sha256"], "size": entry["size"], "pointerSize": 134}
        described["lfs"] = lfs
    return described


MODEL = r"/api/models/(?P<repo_id>[^/]+/[^/]+)"
ROUTES: list[tuple[str, str, Callable]] = [
    ("GET", r"/api/whoami-v2", Handler.whoami),
    ("POST", r"/api/repos/create", Handler.create_repo),
    ("POST", r"/api/validate-yaml", Handler.validate_yaml),
    ("POST", MODEL + r"/preupload/(?P<revision>.+)", Handler.preupload),
    ("POST", MODEL + r"/commit/(?P<revision>.+)", Handler.commit),
    ("POST", MODEL + r"/(?P<kind>branch|tag)/(?P<revision>.+)", Handler.create_ref),
    ("POST", MODEL + r"/paths-info/(?P<revision>.+)", Handler.paths_info),
    ("GET", MODEL + r"/tree/(?P<revision>refs/pr/\d+|[^/]+)(/(?P<folder>.+))?", Handler.tree),
    ("GET", MODEL + r"(/revision/(?P<revision>.+))?", Handler.info),
    ("POST", r"/(?P<repo_id>[^/]+/[^/]+)\.git/info/lfs/objects/batch", Handler.batch),
    ("POST", r"/(?P<repo_id>[^/]+/[^/]+)\.git/info/lfs/verify", Handler.verify),
    ("GET|HEAD", r"/cdn/(?P<sha256>[0-9a-f]{64})", Handler.serve_object),
    (
        "GET|HEAD",
        r"/(?P<repo_id>[^/]+/[^/]+)/resolve/(?P<revision>refs/pr/\d+|[^/]+)/(?P<name>.+)",
        Handler.resolve,
    ),
]


@contextmanager
def run_hub(folder: Path, monkeypatch):
    """Runs a server and points huggingface_hub of this process at it, by its own settings: it reads them when it is
    imported, so they are set as it would have read them. Nothing of the client is replaced."""
    import huggingface_hub
    from huggingface_hub import HfFileSystem, constants
    from transformers.utils.hub import hf_api

    with HubServer(folder / "server").run() as server:
        for name, value in (
            ("ENDPOINT", server.endpoint),
            ("HUGGINGFACE_CO_URL_TEMPLATE", server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"),
            ("HF_HUB_OFFLINE", False),
            ("HF_HUB_DISABLE_XET", True),
            ("HF_HUB_CACHE", str(folder / "cache")),
            ("HF_TOKEN_PATH", str(folder / "no-token")),
        ):
            monkeypatch.setattr(constants, name, value)
        for api in (huggingface_hub.hf_api.api, hf_api()):  # made before, with the endpoint of that time
            monkeypatch.setattr(api, "endpoint", server.endpoint)
        monkeypatch.setenv("HF_TOKEN", WRITE_TOKEN)
        HfFileSystem.clear_instance_cache()
        yield server
