"""Plots and the run's summary."""
