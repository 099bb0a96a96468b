"""Starts the stand-in host as a process of its own, for tests: real sockets, real threads, a fresh interpreter.

with start_host(vram_gb=16) as host:
    host.post("/_host/others", {"bytes": 2**30})
"""

import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NamedTuple
from urllib.error import HTTPError
from urllib.request import Request, urlopen

PACK_ROOT = Path(__file__).resolve().parent.parent.parent
SECONDS_TO_START = 120.0
SECONDS_TO_ANSWER = 90.0


class Answer(NamedTuple):
    status: int
    body: Any
    """Parsed JSON, or text where it is none."""


class HostProcess:
    """A running host; stops at the end of the `with` block."""

    def __init__(self, process: subprocess.Popen[str], url: str, errors: IO[str]) -> None:
        self.url = url
        self._process = process
        self._errors = errors

    def get(self, path: str) -> Answer:
        return self._ask(Request(self.url + path))

    def post(self, path: str, body: Any = None, headers: Mapping[str, str] | None = None) -> Answer:
        data = json.dumps({} if body is None else body).encode()
        return self._ask(Request(self.url + path, data=data, headers={"Content-Type": "application/json", **(headers or {})}))

    def _ask(self, request: Request) -> Answer:
        try:
            with urlopen(request, timeout=SECONDS_TO_ANSWER) as answer:
                return Answer(answer.status, _parsed(answer.read()))
        except HTTPError as error:
            return Answer(error.code, _parsed(error.read()))

    def log_text(self) -> str:
        """What the host logged so far."""
        self._errors.flush()
        return Path(self._errors.name).read_text("utf-8", errors="replace")

    def stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._errors.close()
        Path(self._errors.name).unlink(missing_ok=True)

    def __enter__(self) -> "HostProcess":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()


def start_host(
    vram_gb: float = 16.0,
    others_gb: float = 0.0,
    models: Path | None = None,
    template: str = "",
    custom_nodes: Sequence[Path] = (),
    pack: bool = True,
    step_seconds: float = 0.0,
    dynamic: bool = False,
    aimdo: str = "0.4.13",
    frontend: Path | None = None,
    under: Sequence[str] = (),
) -> HostProcess:
    """Returns once the host answers. Raises RuntimeError with its log when it does not come up.

    `dynamic`: with DynamicVRAM, on a simulation of that release of comfy-aimdo. `under`: a command that runs it, as valgrind.
    """
    command = [*under, sys.executable, "-m", "tests.host", "--port", "0", "--verbose"]
    command += ["--vram-gb", str(vram_gb), "--others-gb", str(others_gb), "--step-seconds", str(step_seconds)]
    command += ["--template", template]
    if frontend is not None:
        command += ["--frontend", str(frontend)]
    if models is not None:
        command += ["--models", str(models)]
    for folder in custom_nodes:
        command += ["--custom-nodes", str(folder)]
    if dynamic:
        command += ["--dynamic-vram", "--aimdo", aimdo]
    if not pack:
        command.append("--no-pack")
    errors = tempfile.NamedTemporaryFile("w", suffix=".log", delete=False)  # noqa: SIM115 - closed by stop()
    process = subprocess.Popen(command, cwd=PACK_ROOT, stdout=subprocess.PIPE, stderr=errors, text=True)
    watchdog = threading.Timer(SECONDS_TO_START, process.kill)
    watchdog.start()
    try:
        for line in process.stdout or ():
            if " open http" in line:
                return HostProcess(process, line.rpartition(" ")[2].strip(), errors)
    finally:
        watchdog.cancel()
    process.wait()
    said = Path(errors.name).read_text("utf-8", errors="replace")
    raise RuntimeError(f"the stand-in host ended with {process.returncode} before it was ready:\n{said}")


def _parsed(data: bytes) -> Any:
    try:
        return json.loads(data) if data else None
    except ValueError:
        return data.decode("utf-8", errors="replace")
