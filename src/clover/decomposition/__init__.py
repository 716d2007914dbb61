"""The mathematics: one change of basis for two sides, pairs under rotation, the fit after a cut."""
