"""Fits a linear classifier to features, so that a backbone without one gives classes.

It is multinomial logistic regression with a squared penalty on the weights, so that its scores are probabilities like
those of a trained head. The penalty is chosen by cross-validation.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from tome_server.models.head import Head

# Weights of the penalty, from almost none to one that leaves little more than the frequencies of the classes.
PENALTIES = tuple(10.0**exponent for exponent in range(-4, 2))
FOLDS = 5
# Enough to compare penalties, and to reach the minimum.
STEPS, LAST_STEPS = 50, 500


def fit_head(
    features: Tensor, labels: Tensor, classes: int, *, seed: int = 0, penalties: Sequence[float] = PENALTIES
) -> Head:
    """Fit a head to the features of labelled images. The same arguments give the same head.

    Args:
        features: [views, N, D]. An image may have several views, such as one for each of several r. All of them count
            alike, and lie in the same fold.
        labels: [N], 0 to classes - 1.
        classes: How many classes there are.
        seed: What folds are drawn by.
        penalties: The weights of the penalty to choose from.

    Raises:
        ValueError: If a class has fewer images than there are folds.
    """
    counts = torch.bincount(labels, minlength=classes)
    if counts.min() < FOLDS:
        few = int(counts.argmin())
        raise ValueError(f"each class needs at least {FOLDS} images to fit a head to; class {few} has {counts[few]}")
    views, _, dim = features.shape
    x = features.double()
    # Channels differ in scale by orders of magnitude, but the penalty should weigh them alike.
    mean, std = x.mean(dim=(0, 1)), x.std(dim=(0, 1)).clamp(min=1e-9)
    x = (x - mean) / std
    folds = _folds(labels, seed)
    right = dict.fromkeys(penalties, 0)
    for fold in range(FOLDS):
        kept, held = folds != fold, folds == fold
        start = torch.zeros(classes, dim + 1, dtype=x.dtype)
        # From the strongest penalty down, each fit starting where the last one ended.
        for penalty in sorted(penalties, reverse=True):
            start = _fit(x[:, kept].flatten(0, 1), labels[kept].repeat(views), penalty, start, STEPS)
            guesses = (x[:, held] @ start[:, :-1].T + start[:, -1]).argmax(dim=2)
            right[penalty] += int((guesses == labels[held]).sum())
    # If several are equally good, the strongest.
    best = max(sorted(penalties, reverse=True), key=right.__getitem__)
    fitted = torch.zeros(classes, dim + 1, dtype=x.dtype)
    for penalty in sorted((p for p in penalties if p >= best), reverse=True):
        fitted = _fit(x.flatten(0, 1), labels.repeat(views), penalty, fitted, LAST_STEPS)
    weight = fitted[:, :-1] / std
    bias = fitted[:, -1] - weight @ mean
    accuracy = right[best] / (views * len(labels))
    return Head(weight.float(), bias.float(), best, accuracy)


def _fit(x: Tensor, labels: Tensor, penalty: float, start: Tensor, steps: int) -> Tensor:
    """Return the weights, with the bias as last column, that minimise the mean cross-entropy plus the penalty."""
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
    """Return the fold of each image, with every class spread evenly over the folds."""
    generator = torch.Generator().manual_seed(seed)
    folds = torch.empty_like(labels)
    for label in range(int(labels.max()) + 1):
        members = (labels == label).nonzero().flatten()
        shuffled = members[torch.randperm(len(members), generator=generator)]
        folds[shuffled] = torch.arange(len(members)) % FOLDS
    return folds
