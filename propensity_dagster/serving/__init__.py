"""The champion behind HTTP. The modules of this folder run in the worker, which has only the bento's packages.

They import the standard library, numpy, msgspec, bentoml, uvicorn, prometheus_client, yaml and redis, and of ours
`errors`, `manifest` and each other. What prepares a release is in `publish/`, which no worker imports.
"""
