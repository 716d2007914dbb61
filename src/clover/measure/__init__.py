"""What users' files hold, and what a model is worth: quality, size and time."""
