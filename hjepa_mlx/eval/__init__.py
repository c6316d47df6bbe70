"""Evaluation: pure functions on arrays, and the report that puts them side by side."""
