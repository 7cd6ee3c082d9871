"""stepdown: progressive three-tier block pruning (Dense -> 2:4 -> TopK) of causal language models."""
