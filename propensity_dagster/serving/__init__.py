"""The champion behind HTTP. The modules of this folder run in the worker, which has only the bento's packages.

They import the standard library, numpy, msgspec, bentoml, uvicorn, prometheus_client, yaml, redis, `errors`,
`manifest`, and each other.
What prepares a release on the batch side is in `publish/`, which no worker imports.
"""
