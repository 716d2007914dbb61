"""Work that ends whole or not at all, by one process or several."""
