"""The ComfyUI side: thin nodes, routes and hooks over the engine in `vram`."""
