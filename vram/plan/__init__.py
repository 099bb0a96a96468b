"""Will the whole graph fit, phase by phase? Pure Python: no torch, no clock."""
