"""Training: the loop, the step and everything between the ranks."""
