"""The model store: versions, aliases, decisions. MLflow behind a small protocol."""
