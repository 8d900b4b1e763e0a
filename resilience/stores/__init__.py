"""Floor 1: state, and the only I/O of the core. A store owns its clock and calls ``decisions`` to decide."""
