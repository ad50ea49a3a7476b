"""This server without one of its special ways, or its batcher behind stock uvicorn: what each of them gives.

python -m benchmarks.peers.own_server MODEL PORT KEYS --without short_way|event_loop|protocol
"""

from __future__ import annotations

import argparse
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from image_classifier.published.predictor import load_predictor
from image_classifier.serving import server
from image_classifier.serving.app import App
from image_classifier.serving.batching import AT_ONCE_S, Batcher, Ticket
from image_classifier.serving.service import Service
from image_classifier.serving.settings import ServerSettings
from image_classifier.serving.source import ModelSource
from image_classifier.serving.telemetry import Metrics


class HandingBatcher(Batcher):
    """Hands every batch to the threads that compute."""

    def _dispatch(self) -> None:
        batch: list[Ticket] = []
        self._read_arrived(batch, time.perf_counter() + AT_ONCE_S)
        for ticket in batch:
            self._decoded.put(ticket)
        if self._arrived:
            self._loop.call_soon(self._dispatch)


def serve_plainly(settings: ServerSettings) -> None:
    """Serve by stock uvicorn with one route that takes raw bytes; no keys, limits, metrics or log."""
    predictor = load_predictor(Path(settings.model), num_threads=1, num_lone_threads=settings.count_threads())
    predictor.measure()
    threads = settings.count_threads()
    batcher = Batcher(predictor, max_batch=32, max_queue=1024, timeout_s=5, num_threads=threads)
    service = Service(settings, batcher, Metrics(), "model")

    async def predict(request: Request) -> Response:
        ticket = await batcher.submit(Ticket(await request.body()))
        return Response(service.build_answer((ticket,), "1"), media_type="application/json")

    @asynccontextmanager
    async def live(app: Starlette) -> AsyncIterator[None]:
        batcher.start()
        yield
        batcher.stop()

    app = Starlette(routes=[Route("/predict", predict, methods=["POST"])], lifespan=live)
    uvicorn.run(app, port=settings.port, http="httptools", loop="uvloop", access_log=False, log_level="warning")


def main() -> None:
    """Take one special way out, and serve."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("port", type=int)
    parser.add_argument("keys", type=Path)
    parser.add_argument("--without", choices=["short_way", "event_loop", "protocol"], required=True)
    arguments = parser.parse_args()
    settings = ServerSettings(
        model=arguments.model, port=arguments.port, api_keys_file=arguments.keys, drain_s=0, log_format="plain"
    )
    if arguments.without == "protocol":
        serve_plainly(settings)
        return
    if arguments.without == "short_way":
        App.has_fast_path = False  # type: ignore[assignment,method-assign]  # a property otherwise
    else:
        vars(server)["Batcher"] = HandingBatcher
    server.serve(settings, ModelSource(settings, None))


if __name__ == "__main__":
    main()
