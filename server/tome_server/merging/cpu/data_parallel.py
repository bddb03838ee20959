"""Data parallelism on the CPU: a few threads each run the model for some of a batch's images.

torch's threads would share the work of single operations instead, with an overhead that weighs more the smaller these
are.
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
    """A merged model that divides the images of a batch among workers.

    It does so if torch is set to more than one thread when it is called; otherwise it runs in the calling thread.
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
        """Make a model of packed layers.

        Args:
            model: the model.
            proportional_attention: whether attention weighs each token by the number of patches it stands for.
            layers: the model's blocks, packed for one thread.
            workers: the threads.
            division: what is divided among the workers, for people to read.
            together: a forward pass in which all workers run one batch, for batches that don't divide evenly. Without
                it, some workers get one image more than others.
        """
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
        """Classify images; see `MergedModel.forward`."""
        run = partial(super().forward, return_tokens=return_tokens, return_token_map=return_token_map)
        # torch records the operations of the calling thread only.
        if is_recording() or torch.get_num_threads() == 1 or not isinstance(images, Tensor) or len(images) == 0:
            return run(images, r)
        order, count = self._order(r, self._checked(images)), self._workers.count
        if self._together is not None and len(order) % count:
            return self._together(images, r, return_tokens=return_tokens, return_token_map=return_token_map)
        # Every worker gets some images that merge much and some that merge little.
        parts = [order[i::count] for i in range(min(count, len(order)))]
        outputs = self._workers.each([partial(run, *_part(images, r, part)) for part in parts])
        return _joined(outputs, [image for part in parts for image in part])

    def _order(self, r: int | Schedule | Sequence[int | Schedule], batch: int) -> Sequence[int]:
        """Return the indices of a batch's images; if workers get several, in order of falling r."""
        if isinstance(r, Sequence) and len(r) != batch:
            raise ValueError(f"r must be one for all images or one for each of the {batch}, not {len(r)}")
        if not isinstance(r, Sequence) or batch <= self._workers.count:
            return range(batch)
        return sorted(range(batch), key=lambda image: -sum(as_schedule(r[image]).per_block(self.depth)))


def _part(
    images: Tensor, r: int | Schedule | Sequence[int | Schedule], indices: Sequence[int]
) -> tuple[Tensor, int | Schedule | Sequence[int | Schedule]]:
    """Return the images of these indices, and their r."""
    # A slice for a range: it doesn't copy.
    part = images[indices.start : indices.stop : indices.step] if isinstance(indices, range) else images[indices]
    return part, [r[image] for image in indices] if isinstance(r, Sequence) else r


def _joined(outputs: Sequence[MergedOutput], order: Sequence[int]) -> MergedOutput:
    """Return the outputs of all images in the order of the batch; `outputs` have them in `order`."""
    if len(outputs) == 1:  # a batch of one image
        return outputs[0]
    back = sorted(range(len(order)), key=order.__getitem__)
    counts = [tokens for output in outputs for tokens in output.tokens_per_block]
    return MergedOutput(
        logits=torch.cat([output.logits for output in outputs])[back],
        features=torch.cat([output.features for output in outputs])[back],
        tokens_per_block=tuple(counts[i] for i in back),
        tokens=_joined_field([output.tokens for output in outputs], back),
        sizes=_joined_field([output.sizes for output in outputs], back),
        token_map=_joined_field([output.token_map for output in outputs], back, fill=-1),
    )


def _joined_field(parts: Sequence[Tensor | None], back: Sequence[int], fill: int = 0) -> Tensor | None:
    tensors = [part for part in parts if part is not None]
    return in_order(tensors, back, fill) if tensors else None
