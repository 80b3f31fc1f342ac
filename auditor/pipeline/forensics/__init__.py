"""Which pipeline made this? A search for what gave a network's input, or a result."""
