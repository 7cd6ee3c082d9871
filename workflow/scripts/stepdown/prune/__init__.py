"""Everything that visits the decoder layers of a model to change it."""
