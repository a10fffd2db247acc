"""The champion behind HTTP. The modules of this folder run in the worker, which has only the bento's packages.

They import the standard library, numpy, msgspec, bentoml, prometheus_client, yaml, `errors`, `manifest` and each other.
What prepares a release on the batch side is in `publish/`, which no worker imports.
"""
