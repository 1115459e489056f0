"""The two stages, the audit, checkpoints and metrics."""
