"""What happens before and after the network, on both sides, as segments of the same audit."""
