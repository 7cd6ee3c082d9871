"""One matrix at a time: blocks, masks, tiers, patterns, saliency, the solvers."""
