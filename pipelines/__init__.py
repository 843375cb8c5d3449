"""Orchestration: the stages as Ray tasks, recorded in MLflow."""
