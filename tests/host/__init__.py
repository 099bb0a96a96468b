"""A small ComfyUI-compatible host: the real front end, a simulated card and tiny WAN models, needing torch and aiohttp only."""
