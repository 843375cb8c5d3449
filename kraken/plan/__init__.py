"""What a shape costs, and what to expect of it on devices."""
