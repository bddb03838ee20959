"""The cost of a request to a server besides its model, which bounds the requests a second of one server.

One client sends requests in turn to two servers, each in a process of its own: `tome`, whose model is so small that all
else counts, and `bare`, a gRPC server in Python that reads the same message and sends the same reply at once. The
requests are encoded images of several sizes and ready pixels, `--callers` at a time.

`requests/s` is the rate of answers; the client has one core at most. `loop` is the CPU time of the server's event loop
in ms a request, which bounds a server; `process` that of all its threads, those that decode included; `models` that of
the process that runs the models. Figures are medians over rounds, with the least and the most.

Needs Linux, and cores without other work: on a shared core all times are longer.
"""

import argparse
import asyncio
import io
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeAlias

import benchmarks.environment  # noqa: F401  isort: skip  (before torch)

import grpc
import numpy as np
import timm
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save_file
from tqdm import tqdm

from benchmarks.servers import Server, python_server, tome_server
from tome_api.tables import table
from tome_api.v1 import inference_pb2 as pb
from tome_api.v1 import inference_pb2_grpc
from tome_client import AsyncClient

PATIENCE = 120.0
# A ViT of two blocks, 64 wide.
MODEL = {"img_size": 64, "depth": 2, "embed_dim": 64, "num_heads": 2}
# Width and height of the images, by the format that they are sent in.
KINDS = {"PNG 28x28": (28, 28), "JPEG 224x224": (224, 224), "JPEG 500x375": (500, 375), "pixels 64x64": (64, 64)}

# An encoded image, or its pixels [H, W, 3].
Picture: TypeAlias = bytes | NDArray[np.uint8]


@dataclass(frozen=True)
class Cost:
    """One round of one kind of image at one server. Milliseconds a request."""

    server: str
    kind: str
    rate: float
    """requests a second"""
    loop: float
    process: float
    models: float


def main(argv: Sequence[str] | None = None) -> None:
    args = _arguments().parse_args(argv)
    if args.bare:
        asyncio.run(_serve_bare())
        return
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        servers = {
            "bare": stack.enter_context(python_server("benchmarks.requests", "--bare")),
            "tome": stack.enter_context(_tome(Path(folder), args.callers)),
        }
        costs = asyncio.run(_measured(servers, args))
    if args.json:
        print(json.dumps([asdict(cost) for cost in costs], indent=2))
    else:
        print(f"rounds {args.rounds}  calls {args.calls}  callers {args.callers}")
        print(_table(costs))


async def _measured(servers: dict[str, Server], args: argparse.Namespace) -> list[Cost]:
    costs = []
    with tqdm(total=(args.rounds + 1) * len(KINDS) * len(servers), disable=not sys.stderr.isatty()) as bar:
        for turn in range(args.rounds + 1):
            for kind, size in KINDS.items():
                for name, server in servers.items():
                    cost = await _cost(name, server, kind, _image(kind, size), args.calls, args.callers)
                    if turn:  # the first warms up
                        costs.append(cost)
                    bar.update()
    return costs


async def _cost(name: str, server: Server, kind: str, image: Picture, calls: int, callers: int) -> Cost:
    left = iter(range(calls))
    async with AsyncClient(server.target, timeout=PATIENCE) as client:

        async def ask() -> None:
            for _ in left:
                await client.predict(image, top_k=5)

        await client.predict(image)
        before, began = _used(server.process.pid), time.perf_counter()
        await asyncio.gather(*(ask() for _ in range(callers)))
        seconds, after = time.perf_counter() - began, _used(server.process.pid)
    each = [1e3 * (later - earlier) / calls for earlier, later in zip(before, after, strict=True)]
    return Cost(name, kind, calls / seconds, *each)


def _used(pid: int) -> tuple[float, float, float]:
    """Return the CPU seconds of a server's first thread, of all its threads, and of those of its children."""

    def of(process: int) -> dict[int, float]:
        threads = Path(f"/proc/{process}/task").iterdir()
        return {int(thread.name): int((thread / "schedstat").read_text().split()[0]) / 1e9 for thread in threads}

    own = of(pid)
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return own[pid], sum(own.values()), sum(sum(of(int(child)).values()) for child in children)


def _image(kind: str, size: tuple[int, int]) -> Picture:
    """Return a picture of soft colours, encoded or not; the same one each time."""
    coarse = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    picture = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)
    if kind.startswith("pixels"):
        return np.asarray(picture)
    file = io.BytesIO()
    picture.save(file, kind.split()[0], quality=90)
    return file.getvalue()


def _tome(folder: Path, callers: int) -> AbstractContextManager[Server]:
    """Make a repository of the small model, and run a server of it."""
    weights, models = folder / "weights.safetensors", folder / "models"
    torch.manual_seed(0)
    save_file(timm.create_model("vit_tiny_patch16_224", num_classes=10, **MODEL).state_dict(), weights)
    add = [sys.executable, "-m", "tome_server", "models", "add", "vit_tiny_patch16_224", "--name", "small"]
    add += [
        "--repository",
        str(models),
        "--checkpoint",
        str(weights),
        "--kwargs",
        json.dumps(MODEL),
        "--license",
        "none",
    ]
    subprocess.run([*add, "--no-profile", "--threads", "1"], check=True, stdout=subprocess.DEVNULL)
    return tome_server(
        *("--repository", str(models), "--metrics", "off", "--threads", "1", "--max-batch", "32"),
        *("--max-pending", str(2 * callers), "--profiles", str(folder), "--profile-time", "1s"),
    )


async def _serve_bare() -> None:
    """Answer every prediction with the same reply, until the process is ended."""
    reply = pb.PredictResponse(
        model="small",
        predictions=[pb.Prediction(class_id=place, score=0.1) for place in range(5)],
        merging=pb.Merging(r=1, tokens_in=17, tokens_out=15, flops=10**7, flops_saved=10**6),
        timing=pb.Timing(batch_size=8),
    )
    for name in ("decode", "queue", "compute", "total", "slack", "predicted"):
        getattr(reply.timing, name).FromMicroseconds(1234)

    class Bare(inference_pb2_grpc.InferenceServicer):
        async def Predict(self, _request: pb.PredictRequest, _context: object) -> pb.PredictResponse:  # noqa: N802
            answer = pb.PredictResponse()
            answer.CopyFrom(reply)
            return answer

    server = grpc.aio.server()
    inference_pb2_grpc.add_InferenceServicer_to_server(Bare(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(json.dumps({"ready": {"grpc": f"127.0.0.1:{port}"}}), flush=True)
    await server.wait_for_termination()


_COLUMNS: dict[str, tuple[Callable[[Cost], float], int]] = {
    "requests/s": (lambda cost: cost.rate, 0),
    "loop": (lambda cost: cost.loop, 3),
    "process": (lambda cost: cost.process, 3),
    "models": (lambda cost: cost.models, 3),
}


def _table(costs: Sequence[Cost]) -> str:
    rows = []
    for kind in KINDS:
        for server in ("bare", "tome"):
            own = [cost for cost in costs if (cost.kind, cost.server) == (kind, server)]
            cells = []
            for value, digits in _COLUMNS.values():
                values = [value(cost) for cost in own]
                spread = f"[{min(values):,.{digits}f}, {max(values):,.{digits}f}]"
                cells.append(f"{statistics.median(values):,.{digits}f} {spread}")
            rows.append((kind, server, *cells))
    header = ("", "", *_COLUMNS)
    return table(header, rows, right=range(2, len(header)))


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.requests", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="(default: %(default)s)")
    parser.add_argument("--calls", type=int, default=4000, help="in a round of each (default: %(default)s)")
    parser.add_argument("--callers", type=int, default=64, help="calls at once (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--bare", action="store_true", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    main()
