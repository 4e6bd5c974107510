"""Real architectures, without weights and tiny, and a recorder that knows nothing of regraft."""
