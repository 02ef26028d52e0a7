"""Baton's protocol and everything that both sides of it need. Imports neither `api` nor `workers`, no torch, no web framework."""

__version__ = "0.1.0"
