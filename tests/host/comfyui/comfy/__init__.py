"""Stand-ins for the parts of ComfyUI's `comfy` package that custom nodes touch."""
