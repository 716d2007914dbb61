"""Second moments of what flows through the heads, gathered on data."""
