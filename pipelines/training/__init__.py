"""Pretraining on Ray Train: its workers, where they are placed, and how they survive."""
