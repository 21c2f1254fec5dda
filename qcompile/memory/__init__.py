"""Memory of the process: prepared weights that are cached, pages given back; and the environment of a measurement."""
