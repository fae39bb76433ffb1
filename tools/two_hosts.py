"""Train on two hosts, two network namespaces of this machine, and compare with one process.

    sudo python -m tools.two_hosts        Linux; fills docs/reliability.md

Each namespace has an address of its own and they reach each other over a virtual cable alone, so
addresses, ports and interface names have to be right as between real machines.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import load_file

from tools.document import fill
from tools.each_step import follow
from tools.forked import draw_data
from tools.tally import DOCUMENT

HOSTS = {"cnnft-host-0": "10.77.0.1", "cnnft-host-1": "10.77.0.2"}
PROCESSES = 2  # on each
SETTINGS = {
    "backbone": "builtin", "epochs": 3, "batch_size": 7, "workers": 0, "device": "cpu",
    "batchnorm": "frozen", "name": "run", "image_size": 64, "probe_first": False,
}  # fmt: skip


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


@contextmanager
def hosts() -> Iterator[None]:
    """Two namespaces and the cable between them."""
    names = list(HOSTS)
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", "cable0", "netns", names[0], "type", "veth", "peer", "name", "cable1",
           "netns", names[1])  # fmt: skip
        for end, (name, address) in enumerate(HOSTS.items()):
            ip("-n", name, "address", "add", f"{address}/24", "dev", f"cable{end}")
            ip("-n", name, "link", "set", f"cable{end}", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], check=False)


def start(end: int, name: str, *arguments: object) -> subprocess.Popen[str]:
    command = [
        "ip", "netns", "exec", name, sys.executable, "-m", "torch.distributed.run",
        "--nnodes", str(len(HOSTS)), "--nproc-per-node", str(PROCESSES), "--rdzv-backend", "c10d",
        "--rdzv-endpoint", f"{HOSTS['cnnft-host-0']}:29500", "--local-addr", HOSTS[name],
        "--rdzv-conf", f"is_host={int(end == 0)}",  # namespaces have no host names to tell it by
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": f"cable{end}"}
    return subprocess.Popen(
        [*command, *map(str, arguments)], stderr=subprocess.PIPE, text=True, env=environment
    )


def main() -> None:
    with tempfile.TemporaryDirectory() as place, hosts():
        folder = Path(place)
        settings = SETTINGS | {"data": str(draw_data(folder / "data"))}
        (folder / "cases.json").write_text(json.dumps({"many": settings}))
        script = Path(__file__).with_name("each_step.py")
        running = [
            start(end, name, script, folder / "cases.json", folder)
            for end, name in enumerate(HOSTS)
        ]
        for process in running:
            _, err = process.communicate(timeout=600)
            if process.returncode:
                sys.exit(err)
        (folder / "one").mkdir()
        follow(settings, folder / "one")
        files = sorted((folder / "one").glob("*.safetensors"))
        pairs = [(load_file(file), load_file(folder / "many" / file.name)) for file in files]
        worst = max(float((a[n] - b[n]).abs().max()) for a, b in pairs for n in a)
        text = (
            f"{len(HOSTS)} hosts of {PROCESSES} processes each, {len(files)} steps of "
            f"{settings['batch_size']} images, all weights after each step: the largest difference "
            f"to one process is {worst:.1e} (without a probe, which magnifies the last digit of "
            "features)."
        )
        fill(DOCUMENT, "two hosts", text)
        print(text)


if __name__ == "__main__":
    main()
