"""A model's shape, its positions, and what folds into its weights."""
