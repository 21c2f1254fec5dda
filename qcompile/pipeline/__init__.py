"""Which recipes there are, which one to take, and how one runs."""
