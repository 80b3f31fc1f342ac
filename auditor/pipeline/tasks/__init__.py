"""One file per task that a model may be made for: how labels judge its results."""
