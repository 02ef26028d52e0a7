"""Trains the built-in model `baton-tiny` on text that this package generates itself."""
