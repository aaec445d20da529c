"""A Ray of one machine for the demo: a head node as a child process, jobs submitted to it by Ray's own job API.

Token authentication stays off: the dashboard listens on the loopback only, and every port is chosen free. Ray 2.60's GCS and raylet
listen on all interfaces whatever they are told; on a machine that others can reach, use `cluster/` behind a firewall instead.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType

from ray.job_submission import JobStatus, JobSubmissionClient

from emu_ray.errors import EmuRayError, PortInUseError, ResourceError
from emu_ray.session.on_ray import OBJECT_STORE_BYTES

STARTS_WITHIN_S = 90
POLL_S = 0.5
WORKER_PORTS_FROM, WORKER_PORTS = (
    (20_000, 25_000),
    5_000,
)  # below what the system gives to others, and one is free of ours


def check_ports(ports: list[int]) -> None:
    """PortInUseError when another program listens on one of them."""
    for port in ports:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                raise PortInUseError(
                    f"port {port} is in use: end what listens there, or choose another with --port or --dashboard-port"
                ) from None


class LocalCluster:
    """`with LocalCluster(8265) as cluster: cluster.submit(...)`; its processes end with the block."""

    def __init__(self, dashboard_port: int, cpus: int = 2) -> None:
        self.address = f"http://127.0.0.1:{dashboard_port}"
        self._dashboard_port, self._cpus = dashboard_port, cpus
        self._head: subprocess.Popen[bytes] | None = None
        self._log = Path(tempfile.mkdtemp(prefix="emu-ray-")) / "head.log"

    def __enter__(self) -> LocalCluster:
        ports = _free_ports(4)
        low = next(low for low in WORKER_PORTS_FROM if not low <= self._dashboard_port < low + WORKER_PORTS)
        command = [
            *_ends_with_us(), sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats",
            "--node-ip-address=127.0.0.1", f"--port={ports[0]}", f"--num-cpus={self._cpus}", "--num-gpus=0",
            f"--object-store-memory={OBJECT_STORE_BYTES}", "--include-dashboard=true", "--dashboard-host=127.0.0.1",
            f"--dashboard-port={self._dashboard_port}", f"--ray-client-server-port={ports[1]}",
            f"--dashboard-agent-listen-port={ports[2]}", f"--metrics-export-port={ports[3]}",
            f"--min-worker-port={low}", f"--max-worker-port={low + WORKER_PORTS - 1}",
        ]  # fmt: skip
        environment = {**os.environ, "RAY_AUTH_MODE": "disabled"}
        environment.pop("RAY_ADDRESS", None)
        os.environ["RAY_AUTH_MODE"] = "disabled"
        print(f"starting Ray on this machine, dashboard at {self.address}", flush=True)
        with self._log.open("wb") as log:
            self._head = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )
        self._client = self._wait_for_jobs()
        return self

    def _wait_for_jobs(self) -> JobSubmissionClient:
        assert self._head is not None
        deadline = time.monotonic() + STARTS_WITHIN_S
        while time.monotonic() < deadline:
            if self._head.poll() is not None:
                break
            if _answers(self._dashboard_port):  # the client alone would try for a minute, also when the head is dead
                try:
                    client = JobSubmissionClient(self.address)
                    client.list_jobs()
                    return client
                except (ConnectionError, RuntimeError):
                    pass
            time.sleep(POLL_S)
        self.close()
        words = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        raise ResourceError(f"Ray did not start: {words[-1] if words else 'it said nothing'} (log: {self._log})")

    def submit(self, name: str, command: list[str]) -> None:
        """Runs `python COMMAND` as a Ray job, its log line by line here; EmuRayError with its exit when it fails."""
        entrypoint = " ".join([sys.executable, *(f"'{part}'" if " " in part else part for part in command)])
        passed = {
            k: v
            for k, v in os.environ.items()
            if k.startswith(("EMU_RAY_", "OMP_", "AWS_", "HF_", "TRANSFORMERS_", "RAY_TRAIN_"))
        }
        passed |= {"RAY_AUTH_MODE": "disabled", "PYTHONUNBUFFERED": "1", "PYTHONWARNINGS": "ignore"}
        job = self._accepted(entrypoint, passed, name)
        seen, failed = 0, ""
        while True:
            status = self._client.get_job_status(job)
            log = self._client.get_job_logs(job)
            whole = log if status.is_terminal() else log[: log.rfind("\n") + 1]
            for line in whole[seen:].splitlines():
                print(f"    {line}", flush=True)
                failed = line.removeprefix("error: ") if line.startswith("error: ") else failed
            seen = max(seen, len(whole))
            if status.is_terminal():
                break
            time.sleep(POLL_S)
        if status != JobStatus.SUCCEEDED:
            raise EmuRayError(failed or f"the job {name!r} ended as {status}: its log stands above")

    def _accepted(self, entrypoint: str, variables: dict[str, str], name: str) -> str:
        """The id of the job; a head that has just started has no agent to run one for some seconds."""
        deadline = time.monotonic() + STARTS_WITHIN_S
        while True:
            try:
                return self._client.submit_job(
                    entrypoint=entrypoint, runtime_env={"env_vars": variables}, metadata={"step": name}
                )
            except RuntimeError as error:
                if "No available agent" not in str(error) or time.monotonic() > deadline:
                    raise ResourceError(f"Ray did not accept the job {name!r}: {error}") from error
                time.sleep(1)

    def wait_for_interrupt(self) -> None:
        """Until Ctrl+C, or until the head ends."""
        assert self._head is not None
        try:
            self._head.wait()
        except KeyboardInterrupt:
            print("\nending", flush=True)

    def close(self) -> None:
        """Ends the head and everything it started."""
        if self._head is None:
            return
        for kind, patience_s in ((signal.SIGTERM, 15), (signal.SIGKILL, 5)):
            try:
                os.killpg(self._head.pid, kind)
                self._head.wait(patience_s)
            except ProcessLookupError:
                break
            except subprocess.TimeoutExpired:
                continue
        self._head = None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _ends_with_us() -> list[str]:
    """A prefix by which the kernel ends the head when this process is killed: else it would hold the port for ever."""
    setpriv = shutil.which("setpriv")  # of util-linux; elsewhere only `close` ends the head
    return [setpriv, "--pdeathsig", "TERM", "--"] if setpriv else []


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports
