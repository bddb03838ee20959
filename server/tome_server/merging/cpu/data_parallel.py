"""A model that a few threads run side by side, each for some of a batch's images.

torch would divide single operations among them instead, which costs more the smaller these are.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

from tome_server.merging.cpu.workers import Workers
from tome_server.merging.dispatch import is_recording
from tome_server.merging.encoder import Layers
from tome_server.merging.model import MergedModel, MergedOutput, in_order
from tome_server.merging.schedule import Schedule, as_schedule
from tome_server.merging.support import VisionModel

Forward: TypeAlias = Callable[..., MergedOutput]


class DataParallelModel(MergedModel):
    """A model whose images are shared out among `workers`; where they don't go round evenly, `together` has them all.

    `together` is MergedModel's forward pass in another way, said by `division`. Where there is none, some workers have
    one image more than others. Runs so if torch is set to more than one thread when it is called, and otherwise in the
    calling thread.
    """

    def __init__(
        self,
        model: VisionModel,
        proportional_attention: bool,
        layers: Sequence[Layers],
        workers: Workers,
        *,
        division: str = "images",
        together: Forward | None = None,
    ) -> None:
        super().__init__(model, proportional_attention, layers)
        self.division = division
        self._workers = workers
        self._together = together

    def forward(
        self,
        images: Tensor | Mapping[str, Tensor],
        r: int | Schedule | Sequence[int | Schedule] = 0,
        *,
        return_tokens: bool = False,
        return_token_map: bool = False,
    ) -> MergedOutput:
        """As MergedModel does."""
        run = partial(super().forward, return_tokens=return_tokens, return_token_map=return_token_map)
        # Recorded is what the calling thread does.
        if is_recording() or torch.get_num_threads() == 1 or not isinstance(images, Tensor) or len(images) == 0:
            return run(images, r)
        order, count = self._order(r, self._checked(images)), self._workers.count
        if self._together is not None and len(order) % count:
            return self._together(images, r, return_tokens=return_tokens, return_token_map=return_token_map)
        # Each its share of the images that merge much and of those that merge little.
        shares = [order[i::count] for i in range(min(count, len(order)))]
        outputs = self._workers.each([partial(run, *_of(images, r, share)) for share in shares])
        return _joined(outputs, [image for share in shares for image in share])

    def _order(self, r: int | Schedule | Sequence[int | Schedule], batch: int) -> Sequence[int]:
        """Return the images of a batch: where a worker has several, those first that merge most."""
        if isinstance(r, Sequence) and len(r) != batch:
            raise ValueError(f"r must be one for all images or one for each of the {batch}, not {len(r)}")
        if not isinstance(r, Sequence) or batch <= self._workers.count:
            return range(batch)
        return sorted(range(batch), key=lambda image: -sum(as_schedule(r[image]).per_block(self.depth)))


def _of(
    images: Tensor, r: int | Schedule | Sequence[int | Schedule], share: Sequence[int]
) -> tuple[Tensor, int | Schedule | Sequence[int | Schedule]]:
    """Return some of the images, and what each of them merges."""
    some = images[share.start : share.stop : share.step] if isinstance(share, range) else images[share]
    return some, [r[image] for image in share] if isinstance(r, Sequence) else r


def _joined(outputs: Sequence[MergedOutput], order: Sequence[int]) -> MergedOutput:
    """Return what was found for all images, of which `outputs` have those in `order`, as they were in the batch."""
    if len(outputs) == 1:  # of a single image
        return outputs[0]
    back = sorted(range(len(order)), key=order.__getitem__)
    counts = [tokens for output in outputs for tokens in output.tokens_per_block]
    return MergedOutput(
        logits=torch.cat([output.logits for output in outputs])[back],
        features=torch.cat([output.features for output in outputs])[back],
        tokens_per_block=tuple(counts[i] for i in back),
        tokens=_together([output.tokens for output in outputs], back),
        sizes=_together([output.sizes for output in outputs], back),
        token_map=_together([output.token_map for output in outputs], back, fill=-1),
    )


def _together(parts: Sequence[Tensor | None], back: Sequence[int], fill: int = 0) -> Tensor | None:
    wanted = [part for part in parts if part is not None]
    return in_order(wanted, back, fill) if wanted else None
