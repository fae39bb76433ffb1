"""Weights that must be downloaded: where nothing answers, where it is slow, where it works."""

import hashlib
import http.server
import socket
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torchvision.models import squeezenet1_1

from cnnft.errors import UsageError
from cnnft.models.backbones import open_backbone
from cnnft.models.downloads import PATIENCE, DownloadError, patiently
from cnnft.models.hub import Pin

BODY = b"x" * 40


class Handler(http.server.BaseHTTPRequestHandler):
    """/slow sends a byte at a time, /stall stops in the middle, the rest is served at once."""

    pause = 0.1
    routes: dict[str, bytes] = {}  # noqa: RUF012

    def do_GET(self) -> None:
        body = self.routes.get(self.path, BODY)
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.path == "/stall":
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


def fetch(url: str) -> bytes:
    with urllib.request.urlopen(url) as response:
        return response.read()


def test_patience_is_fifteen_seconds():
    assert PATIENCE == 15


def test_a_slow_download_is_never_given_up(server):
    start = time.monotonic()
    assert patiently(lambda: fetch(f"{server}/slow"), patience=1) == BODY
    assert time.monotonic() - start > 2  # much longer than the patience


def test_a_download_that_stalls_is_given_up(server):
    start = time.monotonic()
    with pytest.raises(DownloadError, match="nothing was received"):
        patiently(lambda: fetch(f"{server}/stall"), patience=1)
    assert 1 <= time.monotonic() - start < 4


def test_a_server_that_stays_silent_is_given_up(silent_server):
    start = time.monotonic()
    with pytest.raises(DownloadError, match="nothing was received"):
        patiently(lambda: fetch(silent_server), patience=1)
    assert time.monotonic() - start < 4


def test_errors_of_the_library_pass_through(server):
    with pytest.raises(ZeroDivisionError):
        patiently(lambda: 1 // 0)


def test_sockets_are_as_before_afterwards(server):
    before = (socket.socket.recv, socket.socket.recv_into)
    patiently(lambda: fetch(server))
    assert (socket.socket.recv, socket.socket.recv_into) == before


# The hub libraries themselves, against a hub that is not there.


@pytest.fixture
def no_cache(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "torch"))
    monkeypatch.setattr("cnnft.models.hub.patiently", lambda f: patiently(f, patience=2))


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


def test_a_silent_hub(cnnft, flat, tmp_path, monkeypatch, no_cache, silent_server):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", silent_server)
    monkeypatch.setattr(
        "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE",
        silent_server + "/{repo_id}/resolve/{revision}/{filename}",
    )
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
    assert Path(torch.hub.get_dir(), "checkpoints", "squeezenet.pth").exists()
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert backbone.weights.pin == Pin(digest, f"{server}/squeezenet.pth")


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
    assert "fetching" not in caplog.text
    digest = hashlib.sha256((snapshot / "model.safetensors").read_bytes()).hexdigest()
    assert backbone.weights.pin == Pin(digest, "timm/resnet10t.c3_in1k", "0123abc")
    ours, original = backbone.network.state_dict(), theirs.state_dict()
    assert all(torch.equal(ours[k], original[k]) for k in ours if k not in backbone.head)


def test_a_backbone_without_weights_says_so(monkeypatch, no_cache):
    with pytest.raises(UsageError, match="timm has no pretrained weights for regnetz_005"):
        open_backbone("regnetz_005", 3)
