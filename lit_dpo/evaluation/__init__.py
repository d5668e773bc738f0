"""Is the aligned model better: what was trained, its answers, and what is measured on held-out pairs."""
