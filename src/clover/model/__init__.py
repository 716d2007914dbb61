"""What is known of models: how each family holds its attention, and how a model is read and run."""
