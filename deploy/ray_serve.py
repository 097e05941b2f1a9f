"""Replicas of the server on the machines of a Ray cluster, as many as the load asks for.

    pip install "opsin[serve]" "ray[serve]"
    OPSIN_SERVE_MODEL=opsin/vit-tiny serve run deploy.ray_serve:app

at the root of the repository. The variables are those of `opsin serve` and are read here, once for all replicas; what
belongs to a process (host, port, workers) is Ray's. Each replica has its own queue, and its own /metrics.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from ray import serve

from opsin.cli.serve import settings_from_environment
from opsin.serve.app import create_app

settings = settings_from_environment()


def build() -> FastAPI:
    """On a replica, which is sent requests once its models are loaded, and which fails where they cannot be."""
    failures: list[Exception] = []
    application = create_app(settings, on_failure=failures.append)
    lifespan = application.router.lifespan_context

    @asynccontextmanager
    async def loaded(application: FastAPI) -> AsyncIterator[None]:
        async with lifespan(application):
            while application.state.fleet.problems:
                if failures:
                    raise failures[0]
                await asyncio.sleep(0.05)
            yield

    application.router.lifespan_context = loaded
    return application


@serve.deployment(
    autoscaling_config={"min_replicas": 1, "max_replicas": 16, "target_ongoing_requests": 32},
    max_ongoing_requests=256,  # of a replica; others wait at Ray's proxy
    ray_actor_options={"num_cpus": 4},  # Ray gives torch so many threads
    graceful_shutdown_timeout_s=60,
)
@serve.ingress(build)
class Opsin:
    """All of it is the application's."""


app = Opsin.bind()
