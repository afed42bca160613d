"""Claims of the papers, decided by rules that are written down before the run."""
