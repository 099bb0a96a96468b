"""comfy-aimdo's Python surface, as far as ComfyUI 0.33 and this pack use it, on the simulated card's pages (standin.pages).

Names and signatures are those of 0.4.13, the release that ComfyUI 0.33 asks for; tests/test_aimdo_surface.py holds them to the
real package. NEWER says what later releases added; `--aimdo 0.6.0` starts the stand-in with it.
"""

NEWER = {
    "control.set_simple_vram_headroom": "0.6.0",
    "control.get_simple_vram_headroom": "0.6.0",
}
"""Name -> the release whose Python has it first, of the two that were read."""
