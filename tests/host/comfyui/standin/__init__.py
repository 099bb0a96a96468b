"""What only the stand-in has: its settings, the simulated card, tiny models, the journal of events and the /_host routes."""
