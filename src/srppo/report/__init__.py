"""A run directory becomes one HTML page."""

from srppo.report.build import build

__all__ = ["build"]
