"""Rewritten models in places that don't know this project."""
