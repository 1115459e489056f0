"""Talking to models in a terminal."""
