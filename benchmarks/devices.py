"""The devices that policies are compared on, in simulation: how long their batches take, and what each r is worth."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tome_server.calibration.profile_store import read_profile
from tome_server.models.bundled import BUNDLED
from tome_server.scheduling.profile import Profile

STORED = Path(__file__).parent / "profiles" / "fashion.json"

# ToMe, appendix: ViT-B/16 (AugReg) at r = 0, 2, … 16.
VIT_B_RS = tuple(range(0, 17, 2))
VIT_B_TOP1 = (84.57, 84.52, 84.39, 84.17, 83.94, 83.37, 82.86, 82.04, 80.38)
VIT_B_GMACS = (17.564, 16.45, 15.33, 14.21, 13.104, 12.01, 10.91, 9.83, 8.772)


@dataclass(frozen=True)
class Device:
    """What serves the requests."""

    name: str
    profile: Profile
    quality: tuple[float, ...]
    """Top-1 in points, by level of the profile."""
    slo: float
    """A budget, in seconds, that leaves room for its largest batches."""

    @property
    def capacity(self) -> float:
        """Images a second at r = 0, in the largest batches."""
        return self.profile.max_batch / self.profile.p50[-1][0]

    @property
    def image(self) -> float:
        """Seconds for one image at r = 0."""
        return self.profile.p50[0][0]


def devices() -> list[Device]:
    """Return the devices, in order of the tables."""
    return [
        # A GPU of some speed, and a CPU: something for each batch, and for each image in it.
        _vit_b("gpu", 32, lambda size, work: 0.0025 + 0.001 * size * work, slo=0.036),
        _vit_b("cpu", 16, lambda size, work: 0.004 + 0.020 * size * work, slo=0.360),
        _fashion(),
        # A fast GPU: launching a batch's kernels takes 6 ms, whatever is in it, and up to 11 images hide in that.
        _vit_b("launch", 32, lambda size, work: max(0.006, 0.0005 + 0.0005 * size * work), slo=0.036),
        # No gain from batches: beyond one image the caches miss, and each image costs more the larger the batch.
        _vit_b("steep", 8, lambda size, work: 0.002 + 0.010 * size**1.2 * work, slo=0.250),
        # int8: half of an image's time isn't products over tokens, and merging saves little.
        _vit_b("int8", 16, lambda size, work: 0.005 + 0.004 * size * (0.5 + 0.5 * work), slo=0.120),
    ]


def vit_b_profile(largest: int, seconds: Callable[[int, float], float]) -> Profile:
    """Return the profile of ViT-B/16 where a batch takes `seconds`, of its size and the share of work that r leaves."""
    sizes = tuple(range(1, largest + 1))
    p50 = tuple(tuple(seconds(size, macs / VIT_B_GMACS[0]) for macs in VIT_B_GMACS) for size in sizes)
    # 1.034 is the 95th percentile of a batch's time where its standard deviation is 2 %.
    return Profile(sizes, VIT_B_RS, p50, tuple(tuple(1.034 * value for value in row) for row in p50))


def _vit_b(name: str, largest: int, seconds: Callable[[int, float], float], *, slo: float) -> Device:
    return Device(name, vit_b_profile(largest, seconds), VIT_B_TOP1, slo)


def _fashion() -> Device:
    levels: Sequence[dict[str, float]] = json.loads((BUNDLED / "fashion" / "quality.json").read_text())["levels"]
    return Device("fashion", read_profile(STORED)[1], tuple(100 * level["top1"] for level in levels), slo=0.120)
