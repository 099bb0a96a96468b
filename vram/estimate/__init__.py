"""What will it need? Pure Python: no torch, no clock, no disk but the header read."""
