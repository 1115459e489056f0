"""The embedded world of the demo."""
