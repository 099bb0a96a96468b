"""`python -m tests.host`: the stand-in host with this pack in it, for people and for tests."""

import argparse
import asyncio
import contextlib
import importlib
import logging
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
PACK_ROOT = HERE.parent.parent
PACK_NAME = "vram-headroom"
GIB = 2**30

logger = logging.getLogger("tests.host")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.host", description=__doc__)
    parser.add_argument("--vram-gb", type=float, default=16.0, help="size of the simulated card in GiB; 0: no GPU")
    parser.add_argument("--others-gb", type=float, default=0.0, help="what other programs hold of it")
    parser.add_argument("--dynamic-vram", action="store_true", help="models in comfy-aimdo's pages, as on NVIDIA cards")
    parser.add_argument("--aimdo", default="0.4.13", help="the comfy-aimdo to play: 0.4.13 or 0.6.0")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=8188, help="0: any that is free")
    parser.add_argument("--step-seconds", type=float, default=0.2, help="how long one forward takes, to watch it")
    parser.add_argument("--models", type=Path, help="a models folder; default: official names and sizes, made up")
    parser.add_argument("--template", default="video_wan2_2_14B_t2v", help="official workflow to open; '' for none")
    parser.add_argument("--frontend", type=Path, help="a folder with another comfyui_frontend_package")
    parser.add_argument("--custom-nodes", type=Path, action="append", default=[], help="a further custom node to load")
    parser.add_argument("--no-pack", action="store_true", help="leave this pack out")
    parser.add_argument("--verbose", action="store_true")
    return parser.parse_args()


def lay_out(base: Path, options: argparse.Namespace) -> Path:
    """The folders of a ComfyUI; returns the one with the models."""
    for name in ("custom_nodes", "input", "output", "temp", "user/default"):
        (base / name).mkdir(parents=True)
    packs = [path.resolve() for path in options.custom_nodes]
    if not options.no_pack:
        place(PACK_ROOT, base / "custom_nodes" / PACK_NAME)
    for path in packs:
        place(path, base / "custom_nodes" / path.name)
    if options.models is not None:
        return options.models.resolve()
    from .checkpoints import write_official_models

    write_official_models(base / "models")
    return base / "models"


def place(pack: Path, where: Path) -> None:
    """A link, as developers have it; a copy where links are not allowed."""
    try:
        where.symlink_to(pack, target_is_directory=pack.is_dir())
    except OSError:
        ignore = shutil.ignore_patterns(".git", "node_modules", "__pycache__", "tests", ".venv")
        shutil.copytree(pack, where, ignore=ignore)


def hide_the_repository() -> None:
    """ComfyUI's `nodes` and ours have the same name; only ComfyUI's may be found by it."""
    hidden = {PACK_ROOT, PACK_ROOT / "tests"}
    kept = [entry for entry in sys.path if Path(entry or os.getcwd()).resolve() not in hidden]
    sys.path[:] = [str(HERE / "comfyui"), *kept]


def main() -> None:
    options = arguments()
    # Ended from outside: leave through the `with` below, which takes the temporary folder away.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    logging.basicConfig(level=logging.INFO if options.verbose else logging.WARNING, format="%(levelname)s %(message)s")
    with tempfile.TemporaryDirectory(prefix="vram-headroom-host-") as folder:
        base = Path(folder)
        models = lay_out(base, options)
        hide_the_repository()
        settings = importlib.import_module("standin.settings")
        settings.configure(
            settings.Settings(
                pack_root=PACK_ROOT,
                base=base,
                models=models,
                vram_bytes=int(options.vram_gb * GIB),
                others_bytes=int(options.others_gb * GIB),
                step_seconds=options.step_seconds,
                template=options.template or None,
                dynamic=options.dynamic_vram,
                aimdo=options.aimdo,
                frontend=options.frontend and options.frontend.resolve(),
            )
        )
        importlib.import_module("standin.example").write_example_image(base / "input" / "example.png")
        app = importlib.import_module("standin.app")
        with contextlib.suppress(KeyboardInterrupt):
            asyncio.run(app.serve(options.host, options.port, ready))


def ready(address: str) -> None:
    sys.stdout.write(f"VRAM Headroom's stand-in host is ready: open {address}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
