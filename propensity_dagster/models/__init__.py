"""Estimators, calibration, the ensemble, and the saved-model format."""
