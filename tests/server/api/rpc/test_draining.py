"""How a server takes its leave: announced, then refusing, then gone; and what a client makes of it that watches."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.server.scripted import Bench, Clock, until
from tome_api.v1 import inference_pb2 as pb
from tome_api.v1 import inference_pb2_grpc
from tome_client import AsyncClient, TomeError
from tome_server.api.oip.service import OpenInference
from tome_server.api.rpc.health import HealthServicer
from tome_server.api.rpc.server import NOTICE, REFUSING, SETTLE, RpcServer, RpcSettings

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
OWN_CONNECTION = [("grpc.use_local_subchannel_pool", 1)]
LONG = 1e6


@dataclass
class Server:
    """One in this process; what it was asked for is what its decoder decoded."""

    bench: Bench
    rpc: RpcServer

    @property
    def answered(self) -> int:
        return len(self.bench.decoder.decoded)


@pytest.fixture
async def serve(start: Callable[..., Bench]) -> AsyncIterator[Callable[..., Coroutine[Any, Any, Server]]]:
    """Return a function that starts servers, which are stopped at the end whatever happens."""
    async with AsyncExitStack() as stack:

        async def serve(**settings: Any) -> Server:
            bench = start()
            rpc = RpcServer(bench.engine, OpenInference(bench.engine), RpcSettings("127.0.0.1:0", 2**20, **settings))
            stack.push_async_callback(rpc._server.stop, None)
            await rpc.start()
            rpc.ready()
            return Server(bench, rpc)

        yield serve


@pytest.fixture
def watches(monkeypatch: pytest.MonkeyPatch) -> list[asyncio.Event]:
    """Calls to Watch that servers have got; each is set once it ends."""
    seen: list[asyncio.Event] = []
    watch = HealthServicer.Watch

    async def watched(self: HealthServicer, request: Any, context: Any) -> AsyncIterator[Any]:
        seen.append(ended := asyncio.Event())
        try:
            async for response in watch(self, request, context):
                yield response
        finally:
            ended.set()

    monkeypatch.setattr(HealthServicer, "Watch", watched)
    return seen


@asynccontextmanager
async def stopping(server: Server) -> AsyncIterator["asyncio.Task[None]"]:
    """Yield the stop of a server with all the time in the world, announced already."""
    task = asyncio.create_task(server.rpc.stop(LONG))
    try:
        await until(lambda: not server.rpc._health.serving)
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def ended(call: Any) -> grpc.StatusCode:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code()


async def test_who_watches_health_leaves_out_a_draining_server_before_it_refuses(
    serve: Callable[..., Any], stopped: Clock
) -> None:
    staying, leaving = await serve(), await serve()
    target = f"ipv4:{staying.rpc.address},{leaving.rpc.address}"
    async with AsyncClient(target, retries=False, health_checks=True) as client:
        while not (staying.answered and leaving.answered):
            await client.predict(b"1")
        async with stopping(leaving) as stop:
            # No time passes: it has said that it will go, and takes calls. None fails.
            unasked = 0
            for _ in range(10_000):
                before = leaving.answered
                await client.predict(b"1")
                unasked = unasked + 1 if leaving.answered == before else 0
                if unasked == 10:
                    break
            assert unasked == 10
            assert not leaving.bench.engine.draining.is_set()
            stopped.skip(NOTICE)
            await until(leaving.bench.engine.draining.is_set)
            for _ in range(10):
                await client.predict(b"1")
            stopped.skip(SETTLE)
            await stop
        for _ in range(10):
            await client.predict(b"1")


async def test_a_long_answer_keeps_neither_clients_refused_nor_a_watch_that_ends_and_ends(
    serve: Callable[..., Any], stopped: Clock, watches: list[asyncio.Event]
) -> None:
    server = await serve()
    server.bench.device.gate.clear()
    async with grpc.aio.insecure_channel(server.rpc.address, OWN_CONNECTION) as channel:
        predict = inference_pb2_grpc.InferenceStub(channel).Predict
        health = health_pb2_grpc.HealthStub(channel)
        watch = health.Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == SERVING
        answer = predict(pb.PredictRequest(image=b"7"))
        await server.bench.device.started.get()
        async with stopping(server) as stop:
            assert (await watch.read()).status == NOT_SERVING
            stopped.skip(NOTICE)
            await until(server.bench.engine.draining.is_set)
            with pytest.raises(grpc.aio.AioRpcError, match="the server is shutting down"):
                await predict(pb.PredictRequest(image=b"8"))
            # Who looks after servers by Watch would ask again at once, and again.
            assert (await health.Check(health_pb2.HealthCheckRequest())).status == NOT_SERVING
            assert not watches[0].is_set()
            stopped.skip(REFUSING)
            assert await watch.read() is grpc.aio.EOF
            # Nobody listens there any more, and the connection was told to go away.
            with pytest.raises(grpc.aio.AioRpcError, match="connect"):
                await predict(pb.PredictRequest(image=b"8"))
            assert not answer.done()
            assert not stop.done()
            server.bench.device.gate.set()
            assert (await answer).predictions
            await stop
    assert len(watches) == 1


async def test_a_server_that_is_alone_is_watched_once_while_it_drains(
    serve: Callable[..., Any], stopped: Clock, watches: list[asyncio.Event]
) -> None:
    server = await serve()
    server.bench.device.gate.clear()
    async with AsyncClient(server.rpc.address, retries=False, health_checks=True) as client:
        answer = asyncio.create_task(client.predict(b"7"))
        await server.bench.device.started.get()
        async with stopping(server) as stop:
            stopped.skip(NOTICE)
            await until(server.bench.engine.draining.is_set)
            for _ in range(50):
                with pytest.raises(TomeError, match="UNAVAILABLE"):
                    await client.predict(b"8")
            assert len(watches) == 1
            server.bench.device.gate.set()
            assert (await answer).predictions
            stopped.skip(REFUSING)
            await stop


async def test_connections_that_are_renewed_leave_no_watch_behind(
    serve: Callable[..., Any], watches: list[asyncio.Event]
) -> None:
    server = await serve(max_age=0.1)
    async with AsyncClient(server.rpc.address, health_checks=True) as client:
        while len(watches) < 4:
            assert (await client.predict(b"1")).predictions
        await asyncio.gather(*(watch.wait() for watch in watches[:3]))


async def test_one_stream_a_connection_is_left_to_calls(serve: Callable[..., Any]) -> None:
    server = await serve(max_concurrent_streams=1)
    async with AsyncClient(server.rpc.address, health_checks=True) as client:
        assert (await client.predict(b"1")).predictions
    async with grpc.aio.insecure_channel(server.rpc.address, OWN_CONNECTION) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert await ended(watch.read()) is grpc.StatusCode.UNIMPLEMENTED
        health = health_pb2_grpc.HealthStub(channel)
        assert (await health.Check(health_pb2.HealthCheckRequest())).status == SERVING
