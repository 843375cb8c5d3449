"""One engine on several devices: who computes what, how they meet, and how they add up."""
