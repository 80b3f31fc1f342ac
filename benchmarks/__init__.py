"""Real models and measurements; not part of the installed distribution."""
