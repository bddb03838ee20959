"""The protocol's one way to the engine, shared by gRPC and HTTP."""

import asyncio
import time
from collections.abc import Sequence
from typing import Any

from tome_server.api.oip import describe
from tome_server.api.oip.images import images_of
from tome_server.api.oip.messages import InferRequest, InferResponse, Parameter
from tome_server.api.oip.outputs import check_size, is_wanted, parameters_of, tensors_of, wanted_of
from tome_server.api.oip.parameters import terms_of
from tome_server.errors import InvalidRequestError, UnknownVersionError, UnsupportedError
from tome_server.execution.batch import Outputs
from tome_server.serving.batcher import Served
from tome_server.serving.control import ModelControl
from tome_server.serving.engine import Engine
from tome_server.serving.requests import Reply, Request, deadline_of


class OpenInference:
    """Implements the protocol for both transports. Its methods raise a RequestError for requests that they refuse."""

    def __init__(self, engine: Engine, control: ModelControl | None = None) -> None:
        self.engine = engine
        self._control = control
        self._last_inference: dict[str, int] = {}

    @property
    def ready(self) -> bool:
        """Whether every model is in service, the device answers and the server isn't stopping."""
        names = self.engine.registry.names
        return bool(names) and all(self.model_ready(name) for name in names)

    def model_ready(self, name: str, version: str = "") -> bool:
        """Return whether a model is ready; False if no model has that name."""
        registry, away = self.engine.registry, self.engine.draining.is_set() or self.engine.hung
        served = registry.models.get(name or registry.default_name)
        return served is not None and version in ("", describe.version_of(served)) and not away

    def metadata(self, name: str, version: str = "") -> dict[str, Any]:
        """Describe a model's inputs and outputs."""
        return describe.model_metadata(self._served(name, version))

    def config(self, name: str, version: str = "") -> dict[str, Any]:
        """Describe a model's settings."""
        return describe.model_config(self._served(name, version), self.engine)

    def statistics(self, name: str = "", version: str = "") -> list[dict[str, Any]]:
        """Return the statistics of a model, or of every model in service if `name` is empty."""
        chosen = [self._served(name, version)] if name else self.engine.registry.models.values()
        return [
            describe.model_statistics(self.engine.metrics, served, self._last_inference.get(served.model.name, 0))
            for served in chosen
        ]

    def index(self, ready_only: bool = False) -> list[dict[str, Any]]:
        """List the models."""
        return describe.repository_index(self.engine, ready_only)

    async def load(self, name: str) -> None:
        """Take a model into service."""
        await self._controlled().load(name)

    async def unload(self, name: str) -> None:
        """Take a model out of service."""
        await self._controlled().unload(name)

    async def infer(self, request: InferRequest, arrival: float, time_remaining: float | None) -> InferResponse:
        """Answer a request's images, all or none.

        Its deadline is `arrival`, on the event loop's clock, plus the lesser of `time_remaining` (seconds) and the
        budget in its parameters. When one image fails, or the caller is cancelled, the others are cancelled too. If the
        model is replaced meanwhile, the one that was in service on arrival answers all.
        """
        served = self._served(request.model, request.version)
        terms = terms_of(request.parameters)
        wanted = wanted_of(served.model, request.outputs, terms, request.as_bytes)
        images = images_of(request.input, self.engine.max_pending_of(served))
        check_size(wanted, len(images), request.as_bytes)
        deadline = deadline_of(arrival, terms.budget, time_remaining)
        outputs = Outputs(
            top_k=1,
            features=is_wanted(wanted, "features"),
            token_map=is_wanted(wanted, "token_map"),
            logits=is_wanted(wanted, "logits", "probabilities"),
            patches=is_wanted(wanted, "patch_features"),
        )
        requests = [
            Request(
                model=served.model.name,
                input=image,
                arrival=arrival,
                deadline=deadline,
                r=terms.r,
                min_r=terms.min_r,
                max_r=terms.max_r,
                min_quality=terms.min_quality,
                outputs=outputs,
            )
            for image in images
        ]
        with self.engine.registry.holding(served):
            replies = await self._predict(requests, served)
        self._last_inference[served.model.name] = time.time_ns() // 1_000_000
        parameters: dict[str, Parameter] = parameters_of(replies)
        if terms.mark_final:
            parameters["triton_final_response"] = True
        # Features of patches are megabytes.
        in_thread = outputs.patches
        tensors = await asyncio.to_thread(tensors_of, replies, wanted) if in_thread else tensors_of(replies, wanted)
        return InferResponse(served.model.name, describe.version_of(served), request.id, parameters, tensors)

    def _controlled(self) -> ModelControl:
        if self._control is None:
            raise UnsupportedError("clients may not load and unload models here: see the setting model_control")
        return self._control

    def _served(self, name: str, version: str) -> Served:
        served = self.engine.registry.model(name)
        if version not in ("", describe.version_of(served)):
            raise UnknownVersionError(served.model.name, version[:20], served.model.version)
        return served

    async def _predict(self, requests: Sequence[Request], served: Served) -> list[Reply]:
        """Answer all, or raise the error of the first that fails."""
        if len(requests) == 1:
            return [await self._predict_one(requests[0], served, "image")]
        try:
            async with asyncio.TaskGroup() as tasks:
                running = [
                    tasks.create_task(self._predict_one(request, served, f"image[{i}]"))
                    for i, request in enumerate(requests)
                ]
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None
        return [task.result() for task in running]

    async def _predict_one(self, request: Request, served: Served, image: str) -> Reply:
        try:
            return await self.engine.predict(request, served)
        except InvalidRequestError as error:
            raise InvalidRequestError(_field(error.field, image), error.description) from error


def _field(field: str, image: str) -> str:
    """Return the protocol's name for a field of the engine's request."""
    if field.partition(".")[0] in ("image", "tensor"):
        return image
    return f"parameters.{field}"
