"""A training step by phase."""
