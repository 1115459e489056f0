"""The coherent reward over HTTP."""
