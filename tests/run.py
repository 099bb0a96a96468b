"""The two commands of the README: `python3 tests/run.py host` and `python3 tests/run.py test`.

Each sets up what it needs on a fresh machine: a virtual environment in `.venv`, node packages, Chromium.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
TORCH = "torch==2.13.0"
"""For tests and the demo only: a release of its own, so that no newer one with gigabytes of CUDA is fetched."""

AIMDO = ROOT / "tests" / "aimdo.txt"

OLDER_FRONTENDS = ("1.49.6", "1.35.9", "1.27.10")
"""Of comfyui-frontend-package, beside the newest: people do not update for a while. Each in a folder of its own."""

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def main() -> int:
    command, rest = (sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else ("", [])
    if command == "host":
        set_up_python()
        return subprocess.call([str(PYTHON), "-m", "tests.host", *rest], cwd=ROOT)
    if command == "test":
        set_up_python()
        set_up_frontends()
        set_up_node()
        set_up_browser()
        link_for_type_checker()
        return check(rest)
    sys.stderr.write("usage: python3 tests/run.py host [--vram-gb N] [--port N] | test [pytest arguments]\n")
    return 2


def check(pytest_arguments: list[str]) -> int:
    """Lint, types and tests, each of them even if one before it failed. Returns the first exit status that is not 0."""
    npm = shutil.which("npm") or "npm"
    steps = [
        [str(PYTHON), "-m", "ruff", "check", "."],
        [str(PYTHON), "-m", "ruff", "format", "--check", "."],
        [npm, "run", "--silent", "check:py", "--", "--pythonpath", str(PYTHON)],
        [npm, "run", "--silent", "check:js"],
        [npm, "run", "--silent", "test:js"],
        [str(PYTHON), "-m", "pytest", "tests", *pytest_arguments],
    ]
    failed = 0
    for step in steps:
        sys.stdout.write(f"\n$ {' '.join(Path(part).name if os.sep in part else part for part in step)}\n")
        sys.stdout.flush()
        failed = subprocess.call(step, cwd=ROOT) or failed
    return failed


def set_up_python() -> None:
    requirements = [ROOT / "requirements.txt", ROOT / "tests" / "requirements.txt", AIMDO]
    if up_to_date(VENV / "ready", requirements):
        return
    if not PYTHON.exists():
        venv.create(VENV, with_pip=True)
    pip = [str(PYTHON), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.check_call([*pip, TORCH])
    subprocess.check_call([*pip, "-r", str(requirements[1])])
    for release in aimdo_releases():
        folder = VENV / f"aimdo-{release}"
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.check_call([*pip, "--no-deps", "--target", str(folder), f"comfy-aimdo=={release}"])
    stamp(VENV / "ready", requirements)


def aimdo_releases() -> list[str]:
    """Those of tests/aimdo.txt, where comfy-aimdo is made for this system at all."""
    lines = AIMDO.read_text("utf-8").splitlines()
    return [
        line.partition("==")[2] for line in lines if line.startswith("comfy-aimdo==") and sys.platform in ("linux", "win32")
    ]


def set_up_frontends() -> None:
    for version in OLDER_FRONTENDS:
        folder = VENV / f"frontend-{version}"
        if (folder / "ready").exists():
            continue
        pip = [str(PYTHON), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--upgrade"]
        subprocess.check_call([*pip, "--no-deps", "--target", str(folder), f"comfyui-frontend-package=={version}"])
        stamp(folder / "ready", [])


def set_up_node() -> None:
    if shutil.which("npm") is None:
        install_with_apt("nodejs", "npm")
    lock = [ROOT / "package-lock.json"]
    marker = ROOT / "node_modules" / "ready"
    if not up_to_date(marker, lock):
        npm = shutil.which("npm") or "npm"
        subprocess.check_call([npm, "ci", "--no-audit", "--no-fund", "--loglevel=error"], cwd=ROOT)
        stamp(marker, lock)


def set_up_browser() -> None:
    if not any(shutil.which(name) for name in BROWSERS):
        install_with_apt("chromium", "fonts-dejavu-core")


def install_with_apt(*packages: str) -> None:
    """Debian and its kin; elsewhere the person is told what is missing."""
    if shutil.which("apt-get") is None:
        sys.exit(f"please install {' and '.join(packages)}, then run this again")
    as_root = [] if os.geteuid() == 0 else ["sudo"]
    subprocess.check_call([*as_root, "apt-get", "update", "-qq"])
    subprocess.check_call([*as_root, "apt-get", "install", "-y", "-qq", "--no-install-recommends", *packages])


def link_for_type_checker() -> None:
    """Tests import the pack as `vram_headroom`; this gives the type checker a folder of that name."""
    link = ROOT / ".types" / "vram_headroom"
    link.parent.mkdir(exist_ok=True)
    if not link.exists():
        link.symlink_to(ROOT, target_is_directory=True)


def digest(files: list[Path]) -> str:
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def up_to_date(marker: Path, files: list[Path]) -> bool:
    return marker.exists() and marker.read_text() == digest(files)


def stamp(marker: Path, files: list[Path]) -> None:
    marker.write_text(digest(files))


if __name__ == "__main__":
    sys.exit(main())
