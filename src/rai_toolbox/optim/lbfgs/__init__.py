"""Limited-memory BFGS inside a set: its parts, each on flat vectors."""
