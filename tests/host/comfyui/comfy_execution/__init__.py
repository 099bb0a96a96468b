"""Stand-ins for ComfyUI's graph execution package."""
