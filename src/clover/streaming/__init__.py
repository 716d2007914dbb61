"""The same from file to file, for models larger than memory."""
