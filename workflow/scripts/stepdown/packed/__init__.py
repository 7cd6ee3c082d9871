"""Matrices in three tiers as they are stored and run: the format, the linear that computes with it, its kernels."""
