"""Other methods on the same parts, as controls of a recipe: docs/baselines.md."""
