"""Runs a batch on a device."""

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from tome_server.merging import unmerge
from tome_server.models.loaded import LoadedModel
from tome_server.runtime.work import BatchResult, Result, Work


@torch.inference_mode()
def run_batch(
    model: LoadedModel,
    batch: Sequence[Work[Tensor]],
    rs: int | Sequence[int],
    device: torch.device,
    *,
    packed: bool = True,
) -> BatchResult:
    """Run `batch` on `device` in the calling thread, at one r or at each image's own; results are in its order.

    Images that differ in r share one call of the model, or if not `packed` only with those of the same r. Raises
    ValueError if `rs` isn't as long as the batch, and whatever the model raises.
    """
    start = time.perf_counter()
    if packed or isinstance(rs, int):
        return BatchResult(tuple(_run(model, batch, rs, device)), time.perf_counter() - start)
    if len(rs) != len(batch):
        raise ValueError(f"rs must be one for each of the {len(batch)} images, not {len(rs)}")
    results: dict[int, Result] = {}
    for r in sorted(set(rs)):
        members = [i for i, own in enumerate(rs) if own == r]
        results.update(zip(members, _run(model, [batch[i] for i in members], r, device), strict=True))
    return BatchResult(tuple(results[i] for i in range(len(batch))), time.perf_counter() - start)


def _run(
    model: LoadedModel, batch: Sequence[Work[Tensor]], r: int | Sequence[int], device: torch.device
) -> list[Result]:
    images = model.input(torch.stack([work.image for work in batch]), device)
    patches = any(work.patches for work in batch)
    mapped = patches or any(work.token_map for work in batch)
    output = model.run(images, r, return_tokens=patches, return_token_map=mapped)
    logits = output.logits.float()
    scores, class_ids = logits.softmax(dim=-1).topk(max(work.top_k for work in batch))
    # One transfer back for each tensor, which also waits for the device.
    all_ids, all_scores = class_ids.tolist(), scores.tolist()
    features = output.features.float().tolist() if any(work.features for work in batch) else None
    all_logits = logits.tolist() if any(work.logits for work in batch) else None
    token_map = output.token_map.tolist() if output.token_map is not None else None
    of_patches = None
    if output.tokens is not None and output.token_map is not None:
        of_patches = unmerge(output.tokens, output.token_map).float().cpu().numpy().astype("<f4", copy=False)
    return [
        Result(
            class_ids=tuple(all_ids[i][: work.top_k]),
            scores=tuple(all_scores[i][: work.top_k]),
            features=tuple(features[i]) if features and work.features else None,
            token_map=tuple(token_map[i]) if token_map and work.token_map else None,
            logits=tuple(all_logits[i]) if all_logits and work.logits else None,
            patches=of_patches[i].tobytes() if of_patches is not None and work.patches else None,
        )
        for i, work in enumerate(batch)
    ]
