"""The engine: memory, models and graphs. Imports nothing of ComfyUI, nor aiohttp."""
