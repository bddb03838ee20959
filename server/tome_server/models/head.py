"""Fits a linear classifier to features, so that a backbone without one gives classes.

Multinomial logistic regression with a squared penalty on the weights: its scores are probabilities, as those of a
trained head are. The penalty is chosen by cross-validation.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

# Weights of the penalty, from next to none to one that leaves little but the classes' shares.
PENALTIES = tuple(10.0**exponent for exponent in range(-4, 2))
FOLDS = 5
# Enough to compare penalties by, and to end at the minimum.
STEPS, LAST_STEPS = 50, 500


@dataclass(frozen=True)
class Head:
    """A linear layer: features [B, D] times `weight` transposed, plus `bias`."""

    weight: Tensor
    """[classes, D] float32"""
    bias: Tensor
    """[classes] float32"""
    penalty: float
    """The one that was chosen."""
    accuracy: float
    """Share of images given their label, each by a head fitted to the other folds."""

    def __call__(self, features: Tensor) -> Tensor:
        """Return the logits [B, classes]."""
        return F.linear(features, self.weight, self.bias)


def fit_head(
    features: Tensor, labels: Tensor, classes: int, *, seed: int = 0, penalties: Sequence[float] = PENALTIES
) -> Head:
    """Fit a head to `features` [views, N, D] of N images, `labels` [N] in 0..classes-1.

    An image may be seen in several ways, such as at several r: all views of it then count alike, and lie in one fold.
    The same arguments give the same head. Raises ValueError if a class has fewer images than there are folds.
    """
    counts = torch.bincount(labels, minlength=classes)
    if counts.min() < FOLDS:
        few = int(counts.argmin())
        raise ValueError(f"each class needs at least {FOLDS} images to fit a head to; class {few} has {counts[few]}")
    views, _, dim = features.shape
    x = features.double()
    # Channels differ in scale by orders of magnitude; the penalty is to weigh them alike.
    mean, std = x.mean(dim=(0, 1)), x.std(dim=(0, 1)).clamp(min=1e-9)
    x = (x - mean) / std
    folds = _folds(labels, seed)
    right = dict.fromkeys(penalties, 0)
    for fold in range(FOLDS):
        kept, held = folds != fold, folds == fold
        start = torch.zeros(classes, dim + 1, dtype=x.dtype)
        # From the strongest penalty down, each starting where the last ended.
        for penalty in sorted(penalties, reverse=True):
            start = _fit(x[:, kept].flatten(0, 1), labels[kept].repeat(views), penalty, start, STEPS)
            guesses = (x[:, held] @ start[:, :-1].T + start[:, -1]).argmax(dim=2)
            right[penalty] += int((guesses == labels[held]).sum())
    # Of equals the strongest.
    best = max(sorted(penalties, reverse=True), key=right.__getitem__)
    fitted = torch.zeros(classes, dim + 1, dtype=x.dtype)
    for penalty in sorted((p for p in penalties if p >= best), reverse=True):
        fitted = _fit(x.flatten(0, 1), labels.repeat(views), penalty, fitted, LAST_STEPS)
    weight = fitted[:, :-1] / std
    bias = fitted[:, -1] - weight @ mean
    accuracy = right[best] / (views * len(labels))
    return Head(weight.float(), bias.float(), best, accuracy)


def _fit(x: Tensor, labels: Tensor, penalty: float, start: Tensor, steps: int) -> Tensor:
    """Return weights and, as the last column, bias that minimise mean cross-entropy plus the penalty."""
    parameters = start.clone().requires_grad_(True)
    optimizer = torch.optim.LBFGS([parameters], max_iter=steps, history_size=20, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        weight, bias = parameters[:, :-1], parameters[:, -1]
        value = F.cross_entropy(x @ weight.T + bias, labels) + penalty / 2 * weight.square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    with torch.enable_grad():
        optimizer.step(loss)  # type: ignore[no-untyped-call]
    return parameters.detach()


def _folds(labels: Tensor, seed: int) -> Tensor:
    """Return a fold for each image, each class spread evenly over all."""
    generator = torch.Generator().manual_seed(seed)
    folds = torch.empty_like(labels)
    for label in range(int(labels.max()) + 1):
        members = (labels == label).nonzero().flatten()
        shuffled = members[torch.randperm(len(members), generator=generator)]
        folds[shuffled] = torch.arange(len(members)) % FOLDS
    return folds
