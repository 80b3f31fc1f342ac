"""Many models on many backends, on one machine or on several (``audit fleet``)."""
