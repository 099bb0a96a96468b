"""Nodes of ComfyUI that are no part of its core."""
