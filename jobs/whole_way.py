"""The whole way, from a pool to a tuned model that answers over HTTP: every job in order, only what is missing.

reads    the source of its first job
writes   every station below ROOT, ROOT/report.html, ROOT/summary.json, ROOT/whole_way.json
command  python -m jobs.whole_way demo; ray job submit --working-dir . -- python -m jobs.whole_way emu --root s3://bucket/run
cost     demo: about 10 minutes on 2 cores; on a cluster the sum of its jobs

Outside a cluster it starts a Ray of its own on this machine, submits the jobs to it with Ray's job API, and ends it again.
Inside a submitted job it runs the same commands on that cluster.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from dataclasses import dataclass, field, replace

from emu_ray.config import SUBMITTED_JOB_VARIABLE, absolute, command_line
from emu_ray.errors import EmuRayError, JobFailedError, PortInUseError, RecipeError
from emu_ray.session.local_cluster import LocalCluster
from emu_ray.session.on_ray import check_memory, quiet
from emu_ray.session.ports import check_ports
from emu_ray.session.request import PROMPT, SEED, first_request
from emu_ray.stations import Station
from emu_ray.stations.folders import BASE_VARIABLE, base_folder
from emu_ray.whole_way import MemoryWatch, Record, Step, run_steps

ENDING_S = 30  # within which the Ray of a way that was killed has ended
DEMO_BYTES = 6 << 30  # measured: see peak_rss_gb in summary.json


def _step(job: str, recipe: str, *writes: str, name: str = "") -> Step:
    return Step(job=job, arguments=(recipe,), writes=writes, name=name)


DEMO = (
    _step("ingest", "demo", "pool"),
    _step("score", "demo", "scores"),
    _step("select", "demo", "selection"),
    _step("choose", "demo", "chosen"),
    _step("encode", "demo-pretrain", "latents/pretrain", name="encode pretrain"),
    _step("encode", "demo-quality", "latents/quality", name="encode quality"),
    _step("pretrain", "demo", "checkpoints/base"),
    _step("quality_tune", "demo", "checkpoints/tuned"),
    _step("sample", "demo-base", "samples/base", name="sample base"),
    _step("sample", "demo-tuned", "samples/tuned", name="sample tuned"),
    _step("evaluate", "demo", "evaluation"),
)
STAMPS = (
    _step("ingest", "stamps", "pool"),
    _step("score", "stamps", "scores"),
    _step("select", "stamps", "selection"),
    _step("choose", "stamps", "chosen"),
    _step("train_autoencoder", "stamps", "autoencoder"),
    _step("encode", "stamps-pretrain", "latents/pretrain", name="encode pretrain"),
    _step("encode", "stamps-quality", "latents/quality", name="encode quality"),
    _step("pretrain", "stamps", "checkpoints/base"),
    _step("quality_tune", "stamps", "checkpoints/tuned"),
    _step("sample", "stamps-base", "samples/base", name="sample base"),
    _step("sample", "stamps-tuned", "samples/tuned", name="sample tuned"),
)


FOLDER = (
    _step("ingest", "folder", "pool"),
    _step("score", "folder", "scores"),
    _step("select", "folder", "selection"),
)

# On a cluster people choose in between: `curate` ends where they begin, `emu` goes on with what they chose.
CURATE = (_step("score", "real", "scores"), _step("select", "real", "selection"))
EMU = (
    _step("text_encoders", "emu", "start"),
    _step("train_autoencoder", "emu", "autoencoder"),
    _step("encode", "emu-pretrain-256", "latents/pretrain-256", name="encode pretrain 256"),
    _step("encode", "emu-pretrain-512", "latents/pretrain-512", name="encode pretrain 512"),
    _step("encode", "emu-pretrain-1024", "latents/pretrain-1024", name="encode pretrain 1024"),
    _step("encode", "emu-quality", "latents/quality", name="encode quality"),
    _step("pretrain", "emu", "checkpoints/base"),
    _step("quality_tune", "emu", "checkpoints/tuned"),
)


@dataclass(frozen=True, kw_only=True)
class WholeWayRecipe:
    """Which steps, and what happens at the end."""

    root: str
    steps: tuple[Step, ...] = field(repr=False)
    needs: tuple[str, ...] = ()  # stations below the root that must be finished before
    on_cluster: bool = False  # takes GPUs that the one-machine Ray started here never has
    serve: bool = True  # deploy the tuned model, and stay up until Ctrl+C
    exit_after_request: bool = False  # ask the service for one picture and end instead
    port: int = 8000
    dashboard_port: int = 8265
    base: str | None = None  # another base than the shipped one
    source: str | None = (
        None  # what ingest reads, in place of its recipe's; made absolute here, before a job's directory is another
    )

    def planned(self) -> list[Step]:
        """The steps, with the source handed to ingest."""
        if self.source is None:
            return list(self.steps)
        given = ("--source", absolute(self.source, "--source"))
        return [replace(s, arguments=(*s.arguments, *given)) if s.job == "ingest" else s for s in self.steps]


RECIPES = {
    "demo": WholeWayRecipe(root="runs/demo", steps=DEMO),
    "stamps": WholeWayRecipe(root="runs/stamps", steps=STAMPS, serve=False, source="../shared/data/stamps"),
    "folder": WholeWayRecipe(root="runs/folder", steps=FOLDER, serve=False, source="images"),
    "curate": WholeWayRecipe(root="runs/emu", steps=CURATE, needs=("pool",), on_cluster=True, serve=False),
    "emu": WholeWayRecipe(
        root="runs/emu", steps=EMU, needs=("pool", "selection", "chosen"), on_cluster=True, serve=False
    ),
}


def run(recipe: WholeWayRecipe) -> None:
    """Run what is missing, then serve."""
    quiet()
    if recipe.base:
        os.environ[BASE_VARIABLE] = os.path.abspath(recipe.base)
    record = Record.read(recipe.root)
    _check_needed(recipe)
    if os.environ.get(SUBMITTED_JOB_VARIABLE):
        run_steps(recipe.planned(), record, str(base_folder()), lambda step: _run_here(step, recipe.root), _say)
        _finish_summary(recipe.root, record)
        return
    if recipe.on_cluster:
        raise RecipeError(
            "this way takes the GPUs of a cluster: submit it with `ray job submit --working-dir . -- python -m jobs.whole_way ...`"
        )
    check_memory(DEMO_BYTES)
    ports = {"--dashboard-port": recipe.dashboard_port} | ({"--port": recipe.port} if recipe.serve else {})
    try:
        check_ports(ports)
    except PortInUseError as error:
        _say(f"{error}; waiting {ENDING_S} s, in case it belongs to a Ray that is just ending")
        check_ports(ports, patience_s=ENDING_S)
    with MemoryWatch() as memory, LocalCluster(recipe.dashboard_port, keep_free=(recipe.port,)) as cluster:
        run_steps(
            recipe.planned(),
            record,
            str(base_folder()),
            lambda s: cluster.submit(s.title, s.command(recipe.root)),
            _say,
        )
        if recipe.serve:
            serve = ["-m", "jobs.serve", "demo", "--root", recipe.root, "--port", str(recipe.port)]
            cluster.submit("serve", serve)
        _note(recipe.root, record, memory)
        if recipe.serve:
            picture = first_request(f"http://127.0.0.1:{recipe.port}")
            Station(recipe.root).put_file("first-request.png", picture)
            _say(f"served: {PROMPT!r} -> {recipe.root}/first-request.png")
            _note(recipe.root, record, memory)
            _say_goodbye(recipe, cluster)
            if not recipe.exit_after_request:
                cluster.wait_for_interrupt()


def _check_needed(recipe: WholeWayRecipe) -> None:
    """What people bring between two ways, asked for before the first step takes a machine."""
    for name in recipe.needs:
        Station(f"{recipe.root}/{name}").require()


def _run_here(step: Step, root: str) -> None:
    code = subprocess.run([sys.executable, *step.command(root)], check=False).returncode
    if code:
        kind = EmuRayError if code == EmuRayError.exit_code else JobFailedError
        raise kind(f"{step.title} ended with exit code {code}: its message stands above")


def _note(root: str, record: Record, memory: MemoryWatch) -> None:
    record.peak_rss_gb = max(record.peak_rss_gb, memory.peak_gb)
    record.write()
    _finish_summary(root, record)


def _finish_summary(root: str, record: Record) -> None:
    content = Station(root).store.get("summary.json")
    if content is None:
        return
    summary = json.loads(content)
    summary["seconds"] = {name: step["seconds"] for name, step in record.steps.items()}
    if record.peak_rss_gb:  # not watched on a cluster: its nodes have metrics of their own
        summary["peak_rss_gb"] = round(record.peak_rss_gb, 2)
    Station(root).put_file("summary.json", json.dumps(summary, indent=2).encode())


def _say(line: str) -> None:
    print(line, flush=True)


def _say_goodbye(recipe: WholeWayRecipe, cluster: LocalCluster) -> None:
    body = json.dumps({"prompt": PROMPT, "seed": SEED})
    answer = '| python3 -c \'import sys,json,base64; sys.stdout.buffer.write(base64.b64decode(json.load(sys.stdin)["data"][0]["b64_json"]))\' > ball.png'
    address = f"http://127.0.0.1:{recipe.port}"
    print(
        f"\nreport     {recipe.root}/report.html\n"
        f"dashboard  {cluster.address}   (jobs: {shlex.join(['ray', 'job', 'list', '--address', cluster.address])})\n"
        f"studio     {address}\n"
        f"ask        curl -s {address}/v1/images/generations -H 'Content-Type: application/json' -d '{body}' {answer}",
        flush=True,
    )
    if not recipe.exit_after_request:
        print("\nThe service stays up until Ctrl+C.", flush=True)


if __name__ == "__main__":
    command_line("whole_way", __doc__ or "", RECIPES, run)
