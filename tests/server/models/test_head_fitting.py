import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tome_server.models.head_fitting import PENALTIES, fit_head


def clusters(spread: float, images: int = 120, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Features of three classes around centres of their own, in channels of very different scale."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(3, 8, generator=torch.Generator().manual_seed(7))
    labels = torch.arange(images) % 3
    features = centres[labels] + spread * torch.randn(images, 8, generator=generator)
    return (features * 10.0 ** torch.arange(-3, 5) + 100)[None], labels


def accuracy(head: object, features: Tensor, labels: Tensor) -> float:
    assert callable(head)
    return float((head(features[0]).argmax(dim=1) == labels).float().mean())


def test_classes_that_can_be_told_apart_are() -> None:
    features, labels = clusters(spread=0.2)
    head = fit_head(features, labels, 3)
    assert accuracy(head, *clusters(spread=0.2, seed=1)) == 1.0
    assert head.accuracy == 1.0
    assert head.weight.shape == (3, 8)
    assert head.weight.dtype == head.bias.dtype == torch.float32


def test_the_expected_accuracy_is_that_on_new_images() -> None:
    features, labels = clusters(spread=1.0, images=600)
    head = fit_head(features, labels, 3)
    assert 0.5 < head.accuracy < 0.97
    assert accuracy(head, *clusters(spread=1.0, images=3000, seed=1)) == pytest.approx(head.accuracy, abs=0.05)


def test_labels_by_chance_give_no_better_than_chance() -> None:
    features, labels = clusters(spread=1.0, images=300)
    shuffled = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(3))]
    head = fit_head(features, shuffled, 3)
    assert head.accuracy < 0.45
    assert head.penalty >= 0.01  # what it learnt was noise, so that little of it was kept


def test_what_is_fitted_minimises_loss_and_penalty() -> None:
    features, labels = clusters(spread=1.0)
    head = fit_head(features, labels, 3, penalties=[0.1])
    x = features[0].double()
    mean, std = x.mean(dim=0), x.std(dim=0)
    weight = (head.weight.double() * std).requires_grad_(True)
    bias = (head.bias.double() + head.weight.double() @ mean).requires_grad_(True)
    loss = F.cross_entropy((x - mean) / std @ weight.T + bias, labels) + 0.05 * weight.square().sum()
    loss.backward()
    assert weight.grad is not None
    assert bias.grad is not None
    assert weight.grad.abs().max() < 1e-3
    assert bias.grad.abs().max() < 1e-3


def test_the_same_seed_gives_the_same_head_and_scale_does_not_matter() -> None:
    features, labels = clusters(spread=1.0)
    given = (features, features, features * 1000)
    first, again, scaled = (fit_head(each, labels, 3, seed=5, penalties=[0.01, 0.1]) for each in given)
    assert torch.equal(first.weight, again.weight)
    assert first.penalty == scaled.penalty
    assert torch.allclose(first(features[0]), scaled(features[0] * 1000), atol=1e-2)


def test_several_views_of_an_image_lie_in_one_fold() -> None:
    # Labels by chance: were a view of each image in the fitted folds, the other would be known by heart.
    generator = torch.Generator().manual_seed(0)
    view = torch.randn(1, 60, 40, generator=generator)
    labels = torch.randint(3, (60,), generator=generator)
    head = fit_head(view.repeat(2, 1, 1), labels, 3, penalties=[PENALTIES[0]])
    assert head.accuracy < 0.6


def test_a_class_of_too_few_images_is_refused() -> None:
    features, labels = clusters(spread=0.2)
    labels[labels == 1] = 0
    labels[:4] = 1
    with pytest.raises(ValueError, match="each class needs at least 5 images to fit a head to; class 1 has 4"):
        fit_head(features, labels, 3)


def test_a_channel_that_never_changes_does_no_harm() -> None:
    features, labels = clusters(spread=0.2)
    features[..., 2] = 7.0
    head = fit_head(features, labels, 3)
    assert head.weight.isfinite().all()
    assert accuracy(head, features, labels) == 1.0
