"""Runs a batch on a device."""

import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tome_server.execution.batch import BatchItem, BatchResult, ItemResult
from tome_server.merging import unmerge
from tome_server.models.loaded import LoadedModel

# The types of the bytes that results hold.
_WIRE = {"features": "<f4", "logits": "<f4", "patches": "<f4", "token_map": "<i4"}


@torch.inference_mode()
def run_batch(
    model: LoadedModel,
    batch: Sequence[BatchItem[Tensor]],
    rs: int | Sequence[int],
    device: torch.device,
    *,
    packed: bool = True,
) -> BatchResult:
    """Run a batch on `device` in the calling thread.

    Args:
        model: The model, on that device.
        batch: The images, and which outputs to return for each.
        rs: One r for all images, or one for each.
        device: Where to run them.
        packed: Whether images of different r share one call of the model. Otherwise there is a call for each r.

    Returns:
        The results in the order of the batch.

    Raises:
        ValueError: If `rs` isn't as long as the batch.
        Exception: What the model raises.
    """
    start = time.perf_counter()
    if not isinstance(rs, int):
        if len(rs) != len(batch):
            raise ValueError(f"rs must be one for each of the {len(batch)} images, not {len(rs)}")
        if len(set(rs)) == 1:
            rs = rs[0]
    if packed or isinstance(rs, int):
        return BatchResult(tuple(_run(model, batch, rs, device)), time.perf_counter() - start)
    results: dict[int, ItemResult] = {}
    for r in sorted(set(rs)):
        members = [i for i, each in enumerate(rs) if each == r]
        results.update(zip(members, _run(model, [batch[i] for i in members], r, device), strict=True))
    return BatchResult(tuple(results[i] for i in range(len(batch))), time.perf_counter() - start)


def _run(
    model: LoadedModel, batch: Sequence[BatchItem[Tensor]], r: int | Sequence[int], device: torch.device
) -> list[ItemResult]:
    images = _input(model, [work.image for work in batch], device)
    asked = [work.outputs for work in batch]
    patches = any(outputs.patches for outputs in asked)
    mapped = patches or any(outputs.token_map for outputs in asked)
    output = model.run(images, r, return_tokens=patches, return_token_map=mapped)
    logits = output.logits.float()
    scores, class_ids = logits.softmax(dim=-1).topk(
        min(model.info.num_classes, max(outputs.top_k for outputs in asked))
    )
    wanted = {"scores": scores, "class_ids": class_ids}
    if any(outputs.features for outputs in asked):
        wanted["features"] = output.features.float()
    if any(outputs.logits for outputs in asked):
        wanted["logits"] = logits
    if output.token_map is not None:
        wanted["token_map"] = output.token_map
    if output.tokens is not None and output.token_map is not None:
        wanted["patches"] = unmerge(output.tokens, output.token_map).float()
    given = _fetched(wanted, device)
    all_ids, all_scores = given.pop("class_ids").tolist(), given.pop("scores").tolist()
    # Bytes are copied to the server's process as a whole; each number of a list would be an object of its own.
    rows = {name: values.numpy().astype(_WIRE[name], copy=False) for name, values in given.items()}
    return [
        ItemResult(
            class_ids=tuple(all_ids[i][: outputs.top_k]),
            scores=tuple(all_scores[i][: outputs.top_k]),
            features=rows["features"][i].tobytes() if outputs.features else None,
            token_map=rows["token_map"][i].tobytes() if outputs.token_map else None,
            logits=rows["logits"][i].tobytes() if outputs.logits else None,
            patches=rows["patches"][i].tobytes() if outputs.patches else None,
        )
        for i, outputs in enumerate(asked)
    ]


def _input(model: LoadedModel, images: Sequence[Tensor], device: torch.device) -> Tensor:
    """Return images [C, H, W] as the batch [B, C, H, W] that the network takes."""
    if len({image.dtype for image in images}) > 1:
        # Some images are normalised already, others aren't.
        return torch.cat([_input(model, [image], device) for image in images])
    if device.type != "cuda" or any(image.is_cuda for image in images):
        return model.input(torch.stack([image.to(device) for image in images]), device)
    # A copy from pinned memory needn't be waited for. torch keeps that memory until the copy is done, then reuses it.
    staged = torch.empty(len(images), *images[0].shape, dtype=images[0].dtype, pin_memory=True)
    return model.input(torch.stack(list(images), out=staged), device)


def _fetched(wanted: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Return tensors copied to the CPU, waiting for the device only once."""
    fetched = {name: values.to("cpu", non_blocking=True) for name, values in wanted.items()}
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
    return fetched
