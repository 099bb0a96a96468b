"""Memory on the card that grows in chunks: where layers without a page are copied to."""

from __future__ import annotations

from standin.pages import BUFFER_CHUNK, Buffer

from . import control


class VRAMBuffer:
    def __init__(self, max_size: int, device: int) -> None:
        self._devctx = control.get_devctx(device)
        self._buffer = Buffer(int(max_size), "layers that are streamed")
        self.device = device
        self.max_size = max_size
        self._allocated = 0

    def size(self) -> int:
        return self._allocated

    def get(self, size: int, offset: int = 0) -> tuple[VRAMBuffer, int, int]:
        """Raises RuntimeError when the card is full: no out-of-memory error of torch's, though it means one."""
        needed = int(size) + int(offset)
        if needed > self._allocated:
            if not self._devctx.grow(self._buffer, needed):
                raise RuntimeError(f"VRAM grow failed: {needed} bytes")
            self._allocated = -(-needed // BUFFER_CHUNK) * BUFFER_CHUNK
        return self, int(offset), int(size)

    def __del__(self) -> None:
        if getattr(self, "_buffer", None) is not None:
            self._devctx.destroy(self._buffer)
