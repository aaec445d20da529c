"""A Ray of one machine for the demo: a head node as a child process, jobs submitted to it by Ray's own job API.

Token authentication stays off: the dashboard listens on the loopback only, and every port is chosen free. Ray 2.60's GCS and raylet
listen on all interfaces whatever they are told; on a machine that others can reach, use `cluster/` behind a firewall instead.
"""

from __future__ import annotations

import os
import shlex
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

from emu_ray.errors import EmuRayError, JobFailedError, ResourceError
from emu_ray.session.on_ray import OBJECT_STORE_BYTES
from emu_ray.session.ports import free_ports

STARTS_WITHIN_S = 90
POLL_S = 0.5
WORKER_PORTS_FROM, WORKER_PORTS = (15_000, 20_000, 25_000), 5_000  # below what the system gives to others


class LocalCluster:
    """`with LocalCluster(8265) as cluster: cluster.submit(...)`; its processes end with the block."""

    def __init__(self, dashboard_port: int, cpus: int = 2, keep_free: tuple[int, ...] = ()) -> None:
        """`keep_free` are ports that no worker may take, since a service will listen there later; two at most."""
        self.address = f"http://127.0.0.1:{dashboard_port}"
        self._dashboard_port, self._cpus = dashboard_port, cpus
        self._taken = (dashboard_port, *keep_free)
        self._head: subprocess.Popen[bytes] | None = None
        self._log = Path(tempfile.mkdtemp(prefix="emu-ray-")) / "head.log"

    def __enter__(self) -> LocalCluster:
        ports = free_ports(4)
        low = next(n for n in WORKER_PORTS_FROM if not any(n <= port < n + WORKER_PORTS for port in self._taken))
        command = [
            *_ends_with_us(), sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats",
            "--node-ip-address=127.0.0.1", f"--port={ports[0]}", f"--num-cpus={self._cpus}", "--num-gpus=0",
            f"--object-store-memory={OBJECT_STORE_BYTES}", "--include-dashboard=true", "--dashboard-host=127.0.0.1",
            f"--dashboard-port={self._dashboard_port}", f"--ray-client-server-port={ports[1]}",
            f"--dashboard-agent-listen-port={ports[2]}", f"--metrics-export-port={ports[3]}",
            f"--min-worker-port={low}", f"--max-worker-port={low + WORKER_PORTS - 1}",
        ]  # fmt: skip
        # Jobs inherit the head's environment; what goes into a job's runtime_env instead is shown by the dashboard.
        environment = {**os.environ, "RAY_AUTH_MODE": "disabled", "PYTHONUNBUFFERED": "1", "PYTHONWARNINGS": "ignore"}
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
        """Runs `python COMMAND` as a Ray job, its log line by line here.

        Raises EmuRayError with the job's own sentence for a user's mistake, JobFailedError when it crashed, ResourceError when Ray did.
        """
        job = self._accepted(shlex.join([sys.executable, *command]), name)
        seen, failed = 0, ""
        while True:
            status, log = self._look(job)
            whole = log if status.is_terminal() else log[: log.rfind("\n") + 1]
            for line in whole[seen:].splitlines():
                print(f"    {line}", flush=True)
                failed = line.removeprefix("error: ") if line.startswith("error: ") else failed
            seen = max(seen, len(whole))
            if status.is_terminal():
                break
            time.sleep(POLL_S)
        if status != JobStatus.SUCCEEDED:
            if failed and self._client.get_job_info(job).driver_exit_code == EmuRayError.exit_code:
                raise EmuRayError(failed)
            raise JobFailedError(f"the job {name!r} ended as {status}: its log stands above")

    def _look(self, job: str) -> tuple[JobStatus, str]:
        """The job's status and its whole log; ResourceError when the head doesn't answer any more."""
        try:
            return self._client.get_job_status(job), self._client.get_job_logs(job)
        except (OSError, RuntimeError) as error:  # requests' errors are OSErrors
            raise ResourceError(
                f"Ray ended in the middle of a job, its log is {self._log}: {_last_line(error)}"
            ) from error

    def _accepted(self, entrypoint: str, name: str) -> str:
        """The id of the job; a head that has just started has no agent to run one for some seconds."""
        deadline = time.monotonic() + STARTS_WITHIN_S
        while True:
            try:
                return self._client.submit_job(entrypoint=entrypoint, metadata={"step": name})
            except (OSError, RuntimeError) as error:  # requests' errors are OSErrors
                if "No available agent" not in str(error) or time.monotonic() > deadline:
                    raise ResourceError(
                        f"Ray did not accept the job {name!r}, its log is {self._log}: {_last_line(error)}"
                    ) from error
                time.sleep(1)

    def wait_for_interrupt(self) -> None:
        """Until Ctrl+C; ResourceError when the head ends unasked."""
        assert self._head is not None
        try:
            code = self._head.wait()
        except KeyboardInterrupt:
            print("\nending", flush=True)
            return
        raise ResourceError(f"Ray ended by itself (exit code {code}), and the service with it: its log is {self._log}")

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


def _last_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0
