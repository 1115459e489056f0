"""Measuring checkpoints."""
