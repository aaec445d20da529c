"""What curation costs against the tightest loop, against its peers, and against the size of the pool.

python -m benchmarks.curation [--quick]; needs the network once, to install the peers into runs/peers, each in a virtual
environment of its own. The last line is JSON; above 1 is better, but for the memory and time ratios:
vs_limit          throughput of the Ray Data pipeline over that of a plain loop of the same steps on the same cores
vs_datajuicer     peer's CPU-seconds an image over ours: size, aspect, perceptual hash
vs_img2dataset    ... fetch from loopback, verify, write;  vs_daft ... decode and resize;  vs_cleanvision ... its nine checks
memory_ratio_10x  peak memory of all processes with 10 times the rows;  time_ratio_4x  time of 4N over that of N
Both sides decode every picture in full; what ours takes when it shrinks them while decoding, as it does in a run, is printed.
Start-up is taken out by running a small number of pictures too. CPU-seconds are of the process and all its children, after its imports.
"""

from __future__ import annotations

import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing import Process
from pathlib import Path

from benchmarks.curation_scaling import scaling_ratios
from benchmarks.pictures import write_folder

REPOSITORY = Path(__file__).resolve().parent.parent
PEERS = REPOSITORY / "runs" / "peers"
PACKAGES = {"datajuicer": "py-data-juicer", "img2dataset": "img2dataset", "daft": "daft", "cleanvision": "cleanvision"}
UNDECLARED = {
    "datajuicer": ["aiohttp", "torch", "torchvision", "imagededup"]
}  # imported by the peer, not required by it
SCRIPTS = {
    "datajuicer": "datajuicer_filter.py",
    "img2dataset": "img2dataset_fetch.py",
    "daft": "daft_resize.py",
    "cleanvision": "cleanvision_issues.py",
}
OURS = {
    "datajuicer": "shape_aspect_hash",
    "img2dataset": "fetch_verify",
    "daft": "decode_resize",
    "cleanvision": "checks",
}
ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "NO_ALBUMENTATIONS_UPDATE": "1",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "DO_NOT_TRACK": "1",
    "DAFT_ANALYTICS_ENABLED": "0",
    "SCARF_NO_ANALYTICS": "true",
}


def main(quick: bool) -> None:
    """Run every comparison and print the ratios."""
    few, many, rounds = (20, 220, 1) if quick else (100, 1000, 3)
    ratios: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="emu_ray-bench-") as work:
        folders = [write_folder(Path(work) / str(n), n) for n in (few, many)]
        with _served(Path(work)) as port:
            lists = [_url_list(folder, port) for folder in folders]
            for peer in PACKAGES:
                places = lists if peer == "img2dataset" else folders
                ours, theirs = [], []
                for _ in range(rounds):  # in turn, so that a busy machine meets both
                    ours.append(_marginal(partial(_our_side, OURS[peer]), places, few, many))
                    theirs.append(_marginal(partial(_peer, peer), places, few, many))
                mine, other = statistics.median(ours), statistics.median(theirs)
                ratios[f"vs_{peer}"] = round(other / mine, 2)
                print(f"{peer}: {other * 1e3:.1f} CPU-ms an image, ours {mine * 1e3:.1f}", flush=True)
                if peer != "img2dataset":  # all peers decode in full; this is what we do in a run
                    shrunk = _marginal(partial(_our_side, f"{OURS[peer]}_shrunk"), folders, few, many)
                    print(f"  with pictures shrunk while decoded: ours {shrunk * 1e3:.1f}", flush=True)
    ratios |= scaling_ratios(quick)
    order = ("vs_limit", *(f"vs_{p}" for p in PACKAGES), "memory_ratio_10x", "time_ratio_4x")
    print(json.dumps({name: ratios[name] for name in order}))


def _marginal(run, places: list[Path], few: int, many: int) -> float:  # type: ignore[no-untyped-def]
    """CPU-seconds an image beyond the start-up."""
    small, large = run(places[0], few), run(places[1], many)
    return (large - small) / (many - few)


def _our_side(name: str, place: Path, expected: int) -> float:
    return _cpu_seconds([sys.executable, "-m", "benchmarks.curation_sides", name, str(place)], expected)


def _peer(name: str, place: Path, expected: int) -> float:
    return _cpu_seconds(
        [str(_python_of(name)), str(REPOSITORY / "benchmarks" / "peers" / SCRIPTS[name]), str(place)], expected
    )


def _python_of(name: str) -> Path:
    """The interpreter of the peer's own environment, installed the first time."""
    home = PEERS / PACKAGES[name]
    python = home / "bin" / "python"
    if not (home / "installed").exists():
        print(f"installing {PACKAGES[name]} into {home}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
        packages = [PACKAGES[name], *UNDECLARED.get(name, [])]
        subprocess.run([str(python), "-m", "pip", "install", "-q", *packages], check=True)
        (home / "installed").touch()
    return python


def _cpu_seconds(command: list[str], expected: int) -> float:
    """What the command says of its own work, after its imports; SystemExit unless the pictures came through.

    A few may be taken for copies by the equal hash of a shifted picture.
    """
    done = subprocess.run(command, cwd=REPOSITORY, env={**os.environ, **ONE_THREAD}, capture_output=True, text=True)
    try:
        told = json.loads(done.stdout.strip().splitlines()[-1])
        if done.returncode == 0 and 0.95 * expected <= told["pictures"] <= expected:
            return float(told["cpu_s"])
    except (ValueError, IndexError, TypeError, KeyError):
        told = None
    sys.exit(f"{' '.join(command)}: expected {expected} pictures, found {told}\n{done.stderr[-3000:]}")


class _Quiet(SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


def _serve(folder: str, port_file: str) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=folder))
    Path(port_file).write_text(str(server.server_address[1]))
    server.serve_forever()


@contextmanager
def _served(folder: Path) -> Iterator[int]:
    """The folder over HTTP on loopback by a process whose CPU time is nobody's: it is waited for after all measuring."""
    port_file = folder / "port"
    server = Process(target=_serve, args=(str(folder), str(port_file)), daemon=True)
    server.start()
    while not port_file.exists() or not port_file.read_text():
        time.sleep(0.05)
    try:
        yield int(port_file.read_text())
    finally:
        server.kill()
        server.join()


def _url_list(folder: Path, port: int) -> Path:
    path = folder.with_suffix(".csv")
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("url", "caption"))
        writer.writerows(
            (f"http://127.0.0.1:{port}/{folder.name}/{p.name}", "a picture") for p in sorted(folder.glob("*.jpg"))
        )
    return path


if __name__ == "__main__":
    main("--quick" in sys.argv[1:])
