"""One small module per foreign format: its files to an SAE, and back where we write it."""
