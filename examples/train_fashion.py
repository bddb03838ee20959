"""Train the small Vision Transformer that ships with tome-serving, on Fashion-MNIST.

    python -m examples.train_fashion --data DIR --out DIR

The model has the token geometry of ViT-S/16 at 224 pixels (196 patches and a class token in 12
blocks), so a step on all tokens is slow on a CPU. Most of the learning therefore happens on smaller
versions of it, each of which hands its weights to the next one:

0. A small convolutional network is trained first. It teaches the transformer, which learns from its
   soft labels and from the true ones. (It is not needed afterwards.)
1. Patches of 4 pixels (49 tokens), 6 blocks.
2. 12 blocks: each block gets a second one behind it that begins as the identity.
3. Patches of 2 pixels (196 tokens): patch and position embeddings are resized. Each step sees a
   random half of the patches.
4. All patches.

The last 2,000 training images are held out to watch the progress. The test images are read once, at
the end. No token merging takes part anywhere.

Writes weights.safetensors (float16) to --out, first after a minute and better ones since; stops and
continues at will (--resume).
"""

import argparse
import copy
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Threads that wait by spinning starve whatever else runs on the machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

import tome_server.merging.timm_import  # noqa: F401  isort: skip
import timm
from timm.layers import (
    PatchDropout,
    build_sincos2d_pos_embed,
    resample_abs_pos_embed,
    resample_patch_embed,
    set_fused_attn,
)

from tome_server.calibration.datasets import DatasetError, read_idx

MEAN, STD = 0.2860, 0.3530  # of the training images' pixels in [0, 1]
HELD_OUT = 2_000
MARGIN = 2  # pixels of background kept around each image, to shift it by as much
FULL_PATCH, FULL_DEPTH = 2, 12


@dataclass(frozen=True)
class Stage:
    """One stretch of the transformer's training."""

    patch: int  # pixels a side
    depth: int  # blocks
    dropped: float  # share of the patches left out of each step
    shift: int  # pixels, each way, that the images are moved by at random
    epochs: float
    lr: tuple[float, float]  # at its start, after the warm-up, and at its end
    ema: float  # decay of the weights' moving average, a step


# Shifts of up to 2 pixels would be no help in so few epochs: 72 % after 700 steps against 79 % without.
STAGES = (
    Stage(patch=4, depth=6, dropped=0.0, shift=0, epochs=6.0, lr=(7.0e-4, 7.0e-4), ema=0.998),
    Stage(patch=4, depth=12, dropped=0.0, shift=0, epochs=4.0, lr=(7.0e-4, 4.0e-4), ema=0.998),
    Stage(patch=2, depth=12, dropped=0.5, shift=0, epochs=1.0, lr=(5.0e-4, 3.0e-4), ema=0.995),
    Stage(patch=2, depth=12, dropped=0.0, shift=0, epochs=0.8, lr=(3.0e-4, 1.0e-5), ema=0.995),
)
BATCH = 64
WARM_UP = 200  # steps, at the start of each stage
SAVE_EVERY = 60.0  # seconds
TEACHER_EPOCHS, TEACHER_BATCH, TEACHER_LR = 6, 128, 3e-3
TEACHER_SHARE, TEMPERATURE = 0.7, 2.0


class Images:
    """Labelled 28x28 images on one device, handed out in batches, shifted and mirrored or plain."""

    def __init__(self, images: Tensor, labels: Tensor, device: torch.device) -> None:
        self.labels = labels.long().to(device)
        self.padded = F.pad(images, (MARGIN,) * 4).to(device)  # uint8, [images, 32, 32]
        self.side = torch.arange(images.shape[-1], device=device)

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, index: Tensor, random: torch.Generator | None = None, shift: int = 0) -> tuple[Tensor, Tensor]:
        """Images [batch, 1, 28, 28], normalised, and labels [batch].

        With random given, half of the images are mirrored and all shifted by up to shift pixels.
        """
        n, last = len(index), len(self.side) - 1
        if random is None:
            offset = torch.full((2, n, 1), MARGIN)
            mirrored = torch.zeros(n, 1, dtype=torch.bool)
        else:
            offset = MARGIN + torch.randint(-shift, shift + 1, (2, n, 1), generator=random)
            mirrored = torch.rand(n, 1, generator=random) < 0.5
        index, offset, mirrored = (t.to(self.side.device) for t in (index, offset, mirrored))
        rows = self.side + offset[0]
        columns = torch.where(mirrored, last - self.side, self.side) + offset[1]
        pixels = self.padded[index[:, None, None], rows[:, :, None], columns[:, None, :]]
        return ((pixels / 255 - MEAN) / STD)[:, None], self.labels[index]


def read_split(folder: Path, split: str) -> tuple[Tensor, Tensor]:
    """Images [images, 28, 28] and labels [images] of "train" or "t10k", gzipped or plain."""
    both = []
    for kind in ("images-idx3", "labels-idx1"):
        plain = folder / f"{split}-{kind}-ubyte"
        path = plain if plain.exists() else plain.with_name(plain.name + ".gz")
        both.append(torch.from_numpy(read_idx(path).copy()))
    return both[0], both[1]


def generator(*key: int) -> torch.Generator:
    """Random numbers that depend on the key alone, so that a resumed run draws the same ones."""
    seed = 0
    for part in key:
        seed = seed * 1_000_003 + part
    return torch.Generator().manual_seed(seed)


def order(count: int, batch: int, step: int, *key: int) -> Tensor:
    """The image indices of one step: every epoch is another shuffle, its odd remainder skipped."""
    epoch, position = divmod(step, count // batch)
    shuffled = torch.randperm(count, generator=generator(*key, epoch))
    return shuffled[position * batch : (position + 1) * batch]


def make_teacher() -> nn.Module:
    """Six convolutions on one grey channel: 290,000 parameters."""

    def convolution(inputs: int, outputs: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]

    layers: list[nn.Module] = []
    for inputs, outputs in ((1, 32), (32, 64), (64, 128)):
        layers += convolution(inputs, outputs) + convolution(outputs, outputs)
        layers.append(nn.MaxPool2d(2) if outputs < 128 else nn.AdaptiveAvgPool2d(1))
    return nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.2), nn.Linear(128, 10))


def make_student(patch: int, depth: int, dropped: float = 0.0) -> nn.Module:
    """The transformer at one stage's size."""
    model: nn.Module = timm.create_model(
        "vit_tiny_patch16_224", img_size=28, patch_size=patch, depth=depth, embed_dim=128, num_heads=2, num_classes=10
    )
    initialise(model)
    if dropped:
        model.patch_drop = PatchDropout(dropped, num_prefix_tokens=1)
    return model


@torch.no_grad()
def initialise(model: nn.Module) -> None:
    """Start at a scale that fits 128 channels; timm's, for wider models, learns slowly here."""
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and name != "head":
            gain = 0.5 if name.endswith(("attn.proj", "mlp.fc2")) else 1.0
            nn.init.normal_(layer.weight, std=gain * layer.in_features**-0.5)
    grid = list(model.patch_embed.grid_size)
    model.pos_embed[:, 1:] = build_sincos2d_pos_embed(grid, model.embed_dim).flatten(0, -2)


def hand_over(old: nn.Module, new: nn.Module) -> None:
    """Start new, which has smaller patches or twice the blocks, from old's weights."""
    state = old.state_dict()
    patch = new.patch_embed.patch_size
    state["patch_embed.proj.weight"] = resample_patch_embed(state["patch_embed.proj.weight"], list(patch))
    state["pos_embed"] = resample_abs_pos_embed(
        state["pos_embed"], list(new.patch_embed.grid_size), num_prefix_tokens=1
    )
    if len(new.blocks) != len(old.blocks):
        blocks = {k: v for k, v in state.items() if k.startswith("blocks.")}
        state = {k: v for k, v in state.items() if k not in blocks}
        for key, value in blocks.items():
            _, number, rest = key.split(".", 2)
            # A branch whose last layer is zero adds nothing: the deeper model begins as the old.
            silent = rest.startswith(("attn.proj.", "mlp.fc2."))
            state[f"blocks.{2 * int(number)}.{rest}"] = value
            state[f"blocks.{2 * int(number) + 1}.{rest}"] = torch.zeros_like(value) if silent else value.clone()
    new.load_state_dict(state)


def export(model: nn.Module, path: Path) -> None:
    """Write the model's weights as float16, first grown to the full size where it is smaller."""
    model = copy.deepcopy(model).cpu()
    if len(model.blocks) != FULL_DEPTH or model.patch_embed.patch_size[0] != FULL_PATCH:
        full = make_student(FULL_PATCH, FULL_DEPTH)
        hand_over(model, full)
        model = full
    replace(path, lambda p: save_file({k: v.half() for k, v in model.state_dict().items()}, p))


def replace(path: Path, write: Any) -> None:
    """Let write fill a file beside path, then rename it, so that a reader never sees half a file."""
    unfinished = path.with_name(path.name + ".part")
    write(unfinished)
    unfinished.chmod(0o644)  # safetensors makes files that only their owner may read
    unfinished.replace(path)


@torch.no_grad()
def accuracy(model: nn.Module, data: Images, channels: int) -> float:
    """Top-1 on all of data, in percent, in float32."""
    model.eval()
    right = 0
    for index in torch.arange(len(data)).split(64):
        images, labels = data.batch(index)
        logits = model(images.expand(-1, channels, -1, -1))
        right += int((logits.argmax(1) == labels).sum())
    model.train()
    return 100 * right / len(data)


def optimizer_for(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """AdamW that decays matrices only."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), fused=True)


def train_teacher(train: Images, held_out: Images, device: torch.device, seed: int) -> nn.Module:
    """Train the convolutional teacher in one cycle of the learning rate."""
    torch.manual_seed(seed)
    net = make_teacher().to(device, memory_format=torch.channels_last)
    optimizer = optimizer_for(net, TEACHER_LR)
    steps = TEACHER_EPOCHS * (len(train) // TEACHER_BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, TEACHER_LR, steps)
    bar = tqdm(range(steps), "teacher", mininterval=5)
    for step in bar:
        index = order(len(train), TEACHER_BATCH, step, seed, 100)
        images, labels = train.batch(index, generator(seed, 101, step), shift=2)
        with torch.autocast(device.type, torch.bfloat16):
            loss = F.cross_entropy(net(images).float(), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    print(f"teacher: {accuracy(net, held_out, 1):.2f} % on held-out training images")
    return net


def train_stage(
    number: int,
    model: nn.Module,
    teacher: nn.Module,
    train: Images,
    held_out: Images,
    out: Path,
    seed: int,
    saved: dict[str, Any] | None,
) -> nn.Module:
    """Run one stage and return the moving average of its weights; saved is a checkpoint of it."""
    stage = STAGES[number]
    device = train.labels.device
    average = copy.deepcopy(model)
    optimizer = optimizer_for(model, stage.lr[0])
    first = 0
    if saved:
        model.load_state_dict(saved["model"])
        average.load_state_dict(saved["average"])
        optimizer.load_state_dict(saved["optimizer"])
        first = saved["step"]

    def save(step: int) -> None:
        checkpoint = {
            "stage": number,
            "step": step,
            "model": model.state_dict(),
            "average": average.state_dict(),
            "optimizer": optimizer.state_dict(),
        }
        replace(out / "checkpoint.pt", lambda p: torch.save(checkpoint, p))
        export(average, out / "weights.safetensors")

    an_epoch = len(train) // BATCH
    steps = round(stage.epochs * an_epoch)
    saved_at = time.monotonic()
    seen_loss = seen_right = 0.0
    model.train()
    bar = tqdm(range(first, steps), f"stage {number + 1}", steps, initial=first, mininterval=5)
    for step in bar:
        start, end = stage.lr
        for group in optimizer.param_groups:
            group["lr"] = min(1.0, (step + 1) / WARM_UP) * (start + (end - start) * step / steps)
        index = order(len(train), BATCH, step, seed, number)
        images, labels = train.batch(index, generator(seed, 200 + number, step), stage.shift)
        # PatchDropout draws from the global generator.
        torch.manual_seed(seed * 1_000_003 + step)
        with torch.autocast(device.type, torch.bfloat16):
            with torch.no_grad():
                taught = teacher(images).float()
            logits = model(images.expand(-1, 3, -1, -1)).float()
        soft = F.kl_div(
            F.log_softmax(logits / TEMPERATURE, 1),
            F.log_softmax(taught / TEMPERATURE, 1),
            reduction="batchmean",
            log_target=True,
        )
        loss = TEACHER_SHARE * TEMPERATURE**2 * soft
        loss = loss + (1 - TEACHER_SHARE) * F.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        # A young average must not cling to where it started.
        decay = min(stage.ema, (step + 1) / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)

        right = (logits.argmax(1) == labels).float().mean().item()
        seen_loss += 0.02 * (loss.item() - seen_loss) if step > first else loss.item()
        seen_right += 0.02 * (right - seen_right) if step > first else right
        bar.set_postfix(loss=f"{seen_loss:.3f}", top1=f"{100 * seen_right:.1f}", refresh=False)
        if time.monotonic() - saved_at > SAVE_EVERY:
            save(step + 1)
            saved_at = time.monotonic()
        if (step + 1) % an_epoch == 0 or step + 1 == steps:
            top1 = accuracy(average, held_out, 3)
            tqdm.write(f"stage {number + 1}, epoch {(step + 1) / an_epoch:.1f}: {top1:.2f} % held out")
    save(steps)
    return average


def main() -> None:
    """Train all stages, then test the weights as they were written."""
    parser = argparse.ArgumentParser(description="Train the bundled Fashion-MNIST transformer.")
    parser.add_argument("--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--out", type=Path, required=True, help="folder for weights, checkpoint")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--threads", type=int, help="CPU threads; torch's own choice if not given")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    args = parser.parse_args()

    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    # The CPU's fused attention has a slow backward pass: 36 images/s against 50 without it.
    set_fused_attn(device.type == "cuda")
    torch.set_flush_denormal(True)

    try:
        images, labels = read_split(args.data, "train")
        test_images, test_labels = read_split(args.data, "t10k")
    except DatasetError as error:
        sys.exit(
            f"{error}\nFashion-MNIST is needed: install Debian's package dataset-fashion-mnist, or "
            "put its four idx files into a folder and name the folder with --data."
        )
    args.out.mkdir(parents=True, exist_ok=True)

    train = Images(images[:-HELD_OUT], labels[:-HELD_OUT], device)
    held_out = Images(images[-HELD_OUT:], labels[-HELD_OUT:], device)
    test = Images(test_images, test_labels, device)

    teacher_file = args.out / "teacher.pt"
    if args.resume and teacher_file.exists():
        teacher = make_teacher().to(device, memory_format=torch.channels_last)
        teacher.load_state_dict(torch.load(teacher_file, device, weights_only=True))
    else:
        teacher = train_teacher(train, held_out, device, args.seed)
        replace(teacher_file, lambda p: torch.save(teacher.state_dict(), p))
    teacher.eval().requires_grad_(False)

    saved: dict[str, Any] | None = None
    if args.resume and (args.out / "checkpoint.pt").exists():
        saved = torch.load(args.out / "checkpoint.pt", device, weights_only=True)
    torch.manual_seed(args.seed)
    model: nn.Module | None = None
    for number, stage in enumerate(STAGES):
        if saved and number < saved["stage"]:
            continue
        begun = time.monotonic()
        new = make_student(stage.patch, stage.depth, stage.dropped).to(device)
        if model is not None:
            hand_over(model, new)
        model = train_stage(number, new, teacher, train, held_out, args.out, args.seed, saved)
        saved = None
        print(f"stage {number + 1} took {time.monotonic() - begun:.0f} s")

    final = make_student(FULL_PATCH, FULL_DEPTH)
    final.load_state_dict(load_file(args.out / "weights.safetensors"))
    print(f"test: {accuracy(final.to(device), test, 3):.2f} % of {len(test)} images")


if __name__ == "__main__":
    main()
