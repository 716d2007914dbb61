"""The attention module of a rewritten model, and its cache."""
