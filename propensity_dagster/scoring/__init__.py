"""Scoring: of a snapshot's population in batches, and of the test rows by every model."""
