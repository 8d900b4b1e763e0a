"""Ground floor: pure decisions over values. No await, no clock, no randomness, no I/O."""
