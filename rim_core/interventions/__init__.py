"""Changes inside a model while it runs: patching, ablation, steering."""
