"""Makes the pack importable as `vram_headroom` before any test module is imported."""

from loadpack import load_pack

load_pack()
