"""The divergence split over segments: what each introduces, and what that does to the outputs."""
