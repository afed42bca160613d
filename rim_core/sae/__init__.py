"""Sparse autoencoders: an activation as a sum of few directions of a learnt dictionary.

Read first: `autoencoder`.

- `autoencoder`: `SparseAutoencoder`, and `splice`, which puts one into a model.
- `training`: `train_sae` on captured activations.
- `judging`: `evaluate_sae`, `cross_entropy_recovered`, `latent_correlations` and its control `random_features`.
- `files`: `save_sae` and `load_sae`, in the format of SAELens 6.
"""
