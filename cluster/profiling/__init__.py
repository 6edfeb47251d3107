"""Measures what a machine's engine and copies take, for the planner."""
