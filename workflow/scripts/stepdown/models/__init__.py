"""A model on disk and in memory: reading, writing, walking, which weights are pruned."""
