"""The version of ComfyUI that this stand-in plays."""

__version__ = "0.33.0"
