"""Deployment: resources, the failure sensor, and the one defs.yaml that points at the campaigns."""
