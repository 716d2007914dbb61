"""From what directions cost to which ranks every head keeps."""
