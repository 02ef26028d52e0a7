"""Faults at every step of a request's life, under load, and what must be true afterwards. See README.md of this folder."""
