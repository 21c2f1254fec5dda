"""Memory of the process: weights that are made once and shared, pages given back, and the machine's description."""
