"""Fine-tuning of the singular values, as a method of peft and from the command line."""
