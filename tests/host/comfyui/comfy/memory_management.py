"""Whether DynamicVRAM is on: standin/dynamic.py sets it, as ComfyUI's main.py does."""

aimdo_enabled = False
