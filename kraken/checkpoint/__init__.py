"""Checkpoints as files: what is in one, and how any process reads what it needs."""
