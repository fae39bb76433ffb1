"""Weights that must be downloaded: where nothing answers, where it is slow, where it works."""

import hashlib
import http.server
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub import hf_hub_download
from safetensors.torch import save_file
from torchvision.models import squeezenet1_1

from cnnft.errors import UsageError
from cnnft.machine.interruption import Interrupted, handled
from cnnft.models.backbones import open_backbone
from cnnft.models.downloads import PATIENCE, DownloadError, download
from cnnft.models.hub import Pin, Remote

BODY = b"x" * 40


class Handler(http.server.BaseHTTPRequestHandler):
    """/slow sends a byte at a time, /stall and /cut stop in the middle; the rest comes at once."""

    pause = 0.1
    routes: dict[str, bytes] = {}  # noqa: RUF012

    def do_GET(self) -> None:
        body = self.routes.get(self.path, BODY)
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.path == "/cut":
            self.wfile.write(body[:10])
        elif self.path == "/stall":
            self.wfile.write(body[:10])
            time.sleep(5)
        elif self.path == "/slow":
            for byte in body:
                self.wfile.write(bytes([byte]))
                self.wfile.flush()
                time.sleep(self.pause)
        else:
            self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture
def silent_server() -> Iterator[str]:
    """Accepts connections and never says a word."""
    listener = socket.create_server(("127.0.0.1", 0))
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    listener.close()


def test_patience_is_fifteen_seconds():
    assert PATIENCE == 15


def test_a_slow_download_is_never_given_up(server, tmp_path):
    start = time.monotonic()
    download(f"{server}/slow", tmp_path / "file", patience=1)
    assert (tmp_path / "file").read_bytes() == BODY
    assert time.monotonic() - start > 2  # much longer than the patience


def test_a_download_that_stalls_is_given_up(server, tmp_path):
    start = time.monotonic()
    with pytest.raises(DownloadError, match="nothing was received for 1 seconds"):
        download(f"{server}/stall", tmp_path / "file", patience=1)
    assert 1 <= time.monotonic() - start < 4
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_stays_silent_is_given_up(silent_server, tmp_path):
    start = time.monotonic()
    with pytest.raises(DownloadError, match="nothing was received"):
        download(silent_server, tmp_path / "file", patience=1)
    assert time.monotonic() - start < 4


@pytest.mark.parametrize(
    ("path", "sha256", "words"),
    [("/cut", "", "ended after 10 of 40 bytes"), ("/whole", "abcdef12", "not abcdef12")],
)
def test_what_is_not_the_file_is_not_kept(server, tmp_path, path, sha256, words):
    with pytest.raises(DownloadError, match=words):
        download(server + path, tmp_path / "file", sha256=sha256)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="signals are sent as on Unix")
def test_a_signal_ends_a_download_and_nothing_is_left(server, tmp_path):
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
    start = time.monotonic()
    with pytest.raises(Interrupted), handled(print, print):
        download(f"{server}/stall", tmp_path / "file")
    assert time.monotonic() - start < 4
    assert list(tmp_path.iterdir()) == []


def test_nothing_of_the_process_changes(server, tmp_path):
    before = (socket.socket.recv, socket.socket.recv_into, socket.getdefaulttimeout())
    threads = {thread.name for thread in threading.enumerate()}
    with pytest.raises(DownloadError):
        download(f"{server}/stall", tmp_path / "file", patience=0.2)
    assert (socket.socket.recv, socket.socket.recv_into, socket.getdefaulttimeout()) == before
    own = {thread.name for thread in threading.enumerate()} - threads
    assert not [name for name in own if "process_request_thread" not in name]  # the server's


# The hubs, where none is there.


@pytest.fixture
def no_cache(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr("cnnft.models.downloads.PATIENCE", 2.0)


def assert_one_sentence(outcome, name: str) -> None:
    assert outcome.code == 1
    (line,) = (line for line in outcome.err.splitlines() if line.startswith("error:"))
    assert name in line and "--weights" in line and "--backbone builtin" in line
    assert "Traceback" not in outcome.err


@pytest.mark.parametrize("name", ["resnet18", "torchvision/resnet18"])
def test_without_dns(name, cnnft, flat, tmp_path, monkeypatch, no_cache):
    def fail(*arguments: object, **options: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    start = time.monotonic()
    outcome = cnnft("finetune", flat, "--backbone", name, "--runs-dir", tmp_path / "runs")
    assert_one_sentence(outcome, name)
    assert time.monotonic() - start < 10
    assert not (tmp_path / "runs").exists()


def use_hub(monkeypatch, address: str) -> None:
    """Instead of huggingface.co."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    for module in ("constants", "file_download"):  # releases before 1 copy it there
        name = f"huggingface_hub.{module}.HUGGINGFACE_CO_URL_TEMPLATE"
        monkeypatch.setattr(name, template, raising=False)


def test_a_silent_hub(cnnft, flat, tmp_path, monkeypatch, no_cache, silent_server):
    use_hub(monkeypatch, silent_server)
    start = time.monotonic()
    outcome = cnnft("finetune", flat, "--backbone", "resnet18", "--runs-dir", tmp_path / "runs")
    assert_one_sentence(outcome, "resnet18")
    assert time.monotonic() - start < 10


def test_torchvision_weights_are_downloaded_and_loaded(
    server, cnnft, flat, tmp_path, monkeypatch, no_cache
):
    """The library's own download, from a server here that has the file it asks for."""
    from torchvision.models import SqueezeNet1_1_Weights

    torch.manual_seed(3)
    theirs = squeezenet1_1()
    file = tmp_path / "weights.pth"
    torch.save(theirs.state_dict(), file)
    monkeypatch.setitem(Handler.routes, "/squeezenet.pth", file.read_bytes())
    weights = SqueezeNet1_1_Weights.IMAGENET1K_V1
    monkeypatch.setattr(type(weights), "url", f"{server}/squeezenet.pth")

    backbone = open_backbone("torchvision/squeezenet1_1", 3)
    ours, original = backbone.network.state_dict(), theirs.state_dict()
    assert backbone.head == {"classifier.1.weight", "classifier.1.bias"}
    assert backbone.weights.missing == ()
    assert all(torch.equal(ours[k], original[k]) for k in ours if k not in backbone.head)
    assert (tmp_path / "torch" / "hub" / "checkpoints" / "squeezenet.pth").exists()
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert backbone.weights.pin == Pin(digest, f"{server}/squeezenet.pth")


class Hub(http.server.BaseHTTPRequestHandler):
    """Answers as the Hugging Face hub does: the file's bytes lie at another address."""

    body, commit = b"weights" * 1000, "0123456789" * 4
    elsewhere: str
    tokens: list = []  # noqa: RUF012

    def do_HEAD(self) -> None:
        if self.path != "/owner/name/resolve/v1/pytorch_model.bin":
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(302)
        self.send_header("Location", f"{self.elsewhere}/storage")
        self.send_header("X-Repo-Commit", self.commit)
        self.send_header("X-Linked-Etag", f'"{hashlib.sha256(self.body).hexdigest()}"')
        self.send_header("X-Linked-Size", str(len(self.body)))
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_GET(self) -> None:
        if self.path == "/storage":  # the library asks for other things too
            self.tokens.append(self.headers.get("Authorization"))
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.body)))
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, *arguments: object) -> None:
        pass


def test_a_file_of_the_hub_is_cached_where_its_library_finds_it(monkeypatch, tmp_path, no_cache):
    """The first name of two is not there; the storage is not told the token."""
    hub, storage = (http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) for _ in range(2))
    for each in (hub, storage):
        threading.Thread(target=each.serve_forever, daemon=True).start()
    monkeypatch.setattr(Hub, "elsewhere", f"http://127.0.0.1:{storage.server_port}", raising=False)
    use_hub(monkeypatch, f"http://127.0.0.1:{hub.server_port}")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    remote = Remote("it", "owner/name@v1", ("model.safetensors", "pytorch_model.bin"))
    assert remote.cached() is None
    path = remote.fetch()
    hub.shutdown()
    storage.shutdown()
    assert path.read_bytes() == Hub.body and Hub.tokens == [None]
    found = hf_hub_download("owner/name", "pytorch_model.bin", revision="v1", local_files_only=True)
    assert Path(found) == path == remote.cached()
    assert remote.pin(path).commit == Hub.commit


def test_cached_weights_ask_no_network(monkeypatch, tmp_path, no_cache, caplog):
    """A file in the hub's cache, as the hub library lays it out, is read by timm's own loader."""
    theirs = timm.create_model("resnet10t.c3_in1k")
    repository = tmp_path / "hf" / "models--timm--resnet10t.c3_in1k"
    snapshot = repository / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    save_file(theirs.state_dict(), snapshot / "model.safetensors")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123abc")

    def fail(*arguments: object, **options: object) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", fail)
    monkeypatch.setattr(socket, "getaddrinfo", fail)
    with caplog.at_level("INFO", "cnnft"):
        backbone = open_backbone("resnet10t", 3)
    assert "downloading" not in caplog.text
    digest = hashlib.sha256((snapshot / "model.safetensors").read_bytes()).hexdigest()
    assert backbone.weights.pin == Pin(digest, "timm/resnet10t.c3_in1k", "0123abc")
    ours, original = backbone.network.state_dict(), theirs.state_dict()
    assert all(torch.equal(ours[k], original[k]) for k in ours if k not in backbone.head)


def test_a_backbone_without_weights_says_so(monkeypatch, no_cache):
    with pytest.raises(UsageError, match="timm has no pretrained weights for regnetz_005"):
        open_backbone("regnetz_005", 3)
