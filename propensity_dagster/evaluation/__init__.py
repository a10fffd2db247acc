"""Splits, metrics, curves, value and the promotion gate. It receives scores and labels, never models."""
