"""DynamicVRAM is off here: the stand-in plays the legacy model management."""

aimdo_enabled = False
