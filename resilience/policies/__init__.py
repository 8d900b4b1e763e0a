"""Floor 2: each policy asks a store and returns a verdict. None knows a wire or another policy."""
