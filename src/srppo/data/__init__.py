"""Rows in, token ids and masks out."""
