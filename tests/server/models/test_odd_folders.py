"""A zoo of faulty model folders: each is refused in words that name where it lies, and no other model suffers."""

import json
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.server.models.conftest import ARCHITECTURE, KWARGS
from tome_server.errors import ConfigError, ModelLoadError
from tome_server.models.loading import load, outline
from tome_server.models.repository import Repository, read_folder
from tome_server.models.spec import ModelSpec, weights_digest

CPU = torch.device("cpu")
Spoil = Callable[[Path], object]


@pytest.fixture
def folder(tiny: nn.Module, tmp_path: Path) -> Path:
    """A good model's folder."""
    folder = tmp_path / "models" / "odd"
    folder.mkdir(parents=True)
    write_config(folder)
    save_file(tiny.state_dict(), folder / "weights.safetensors")
    return folder


def write_config(folder: Path, **settings: Any) -> None:
    config = {"architecture": ARCHITECTURE, "kwargs": KWARGS} | settings
    (folder / "config.yaml").write_text(yaml.safe_dump(config))


def config(**settings: Any) -> Spoil:
    return lambda folder: write_config(folder, **settings)


def kwargs(**changes: Any) -> Spoil:
    return config(kwargs={**KWARGS, **changes})


def data(**settings: Any) -> Spoil:
    return config(data=settings)


def config_text(text: str | bytes) -> Spoil:
    return written("config.yaml", text)


def written(name: str, content: str | bytes) -> Spoil:
    return lambda folder: (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def weights(change: Callable[[dict[str, Tensor]], object]) -> Spoil:
    """Other weights, in a file of torch's, which holds tensors of every kind."""

    def spoil(folder: Path) -> None:
        tensors = _tensors(folder)
        change(tensors)
        (folder / "weights.safetensors").unlink()
        torch.save(tensors, folder / "weights.pth")

    return spoil


def safe_weights(change: Callable[[dict[str, Tensor]], object]) -> Spoil:
    def spoil(folder: Path) -> None:
        tensors = _tensors(folder)
        change(tensors)
        save_file(tensors, folder / "weights.safetensors")

    return spoil


def _tensors(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "weights.safetensors")


def filled(name: str, value: float) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.update({name: tensors[name].index_fill(0, torch.tensor([0]), value)})


def as_type(name: str, dtype: torch.dtype) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.update({name: tensors[name].to(dtype)})


def replaced(name: str, make: Callable[[Tensor], object]) -> Callable[[dict[str, Any]], object]:
    return lambda tensors: tensors.update({name: make(tensors[name])})


def cut(name: str, share: float) -> Spoil:
    def spoil(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(share * len(content))])

    return spoil


def made_folder(name: str) -> Spoil:
    def spoil(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).mkdir()

    return spoil


def link(name: str, to: str) -> Spoil:
    def spoil(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(to)

    return spoil


def fifo(name: str) -> Spoil:
    def spoil(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return spoil


def report(**changes: Any) -> Spoil:
    def spoil(folder: Path) -> None:
        levels = [{"r": 0, "agreement": 1.0, "top1": 0.8}, {"r": 4, "agreement": 0.9, "top1": None}]
        digest = weights_digest(folder / "weights.safetensors")
        content = {"model": ARCHITECTURE, "weights_sha256": digest, "levels": levels, "images": 500} | changes
        (folder / "quality.json").write_text(json.dumps(content))

    return spoil


def level(**changes: Any) -> Spoil:
    return report(levels=[{"r": 0, "agreement": 1.0, "top1": 0.8}, {"r": 4, "agreement": 0.9, "top1": 0.7, **changes}])


def versioned(*versions: str, choice: str = "") -> Spoil:
    """Move the model into folders of versions."""

    def spoil(folder: Path) -> None:
        content = folder.with_name(".content")
        folder.rename(content)
        folder.mkdir()
        for version in versions:
            shutil.copytree(content, folder / version)
        shutil.rmtree(content)
        if choice:
            (folder / "config.yaml").write_text(choice)

    return spoil


def compressed(folder: Path) -> None:
    """A few hundred kilobytes that would become a gigabyte."""
    (folder / "weights.safetensors").unlink()
    torch.save({"head.weight": torch.zeros(1)}, folder / "plain.pth")
    with zipfile.ZipFile(folder / "plain.pth") as plain, zipfile.ZipFile(folder / "weights.pth", "w") as packed:
        for part in plain.infolist():
            packed.writestr(part.filename, plain.read(part), zipfile.ZIP_DEFLATED)
        packed.writestr("archive/data/1", bytes(10**8), zipfile.ZIP_DEFLATED)
    (folder / "plain.pth").unlink()


HEADER_SIZE = (99_000_000).to_bytes(8, "little")
LABELS = "".join(f"class {i}\n" for i in range(7))
HUGE = 10**30
ODD: dict[str, Spoil] = {
    # Weights
    "a sparse tensor": weights(replaced("head.weight", lambda value: value.to_sparse())),
    "a sparse tensor in rows": weights(replaced("head.weight", lambda value: value.to_sparse_csr())),
    "a quantised tensor": weights(
        replaced("head.weight", lambda value: torch.quantize_per_tensor(value, 0.1, 0, torch.qint8))
    ),
    "a tensor without values": weights(replaced("head.weight", lambda value: value.to("meta"))),
    "a nested tensor": weights(replaced("head.weight", lambda value: torch.nested.nested_tensor([value, value[:2]]))),
    "weights that are no tensors": weights(replaced("head.weight", lambda _: "text")),
    "nothing but text": weights(lambda tensors: (tensors.clear(), tensors.update(a="b"))),  # type: ignore[call-overload]
    "a list for weights": lambda folder: (
        (folder / "weights.safetensors").unlink(),
        torch.save([1, 2, 3], folder / "weights.pth"),
    ),
    "no tensors": safe_weights(lambda tensors: tensors.clear()),
    "a tensor too few": safe_weights(lambda tensors: tensors.pop("norm.bias")),
    "a tensor too many": safe_weights(lambda tensors: tensors.update(extra=torch.zeros(1))),
    "another shape": safe_weights(replaced("head.weight", lambda value: value.T.contiguous())),
    "a head of no dimensions": safe_weights(replaced("head.weight", lambda _: torch.tensor(1.0))),
    "a head of three dimensions": safe_weights(replaced("head.weight", lambda value: value[None].contiguous())),
    "positions of an odd number": safe_weights(replaced("pos_embed", lambda value: value[:, :-2].contiguous())),
    "positions of two dimensions": safe_weights(replaced("pos_embed", lambda value: value[0].contiguous())),
    "whole numbers for a head": safe_weights(as_type("head.weight", torch.int64)),
    "bytes for a bias": safe_weights(as_type("blocks.0.attn.qkv.bias", torch.uint8)),
    "truth values for positions": safe_weights(as_type("pos_embed", torch.bool)),
    "complex numbers for a head": weights(as_type("head.weight", torch.complex64)),
    "complex numbers for a head, safely": safe_weights(as_type("head.weight", torch.complex64)),
    "NaN": safe_weights(filled("blocks.1.mlp.fc1.weight", float("nan"))),
    "infinity": safe_weights(filled("head.bias", float("-inf"))),
    "more than float32 holds": safe_weights(
        lambda tensors: tensors.update({"head.bias": tensors["head.bias"].double().fill_(1e300)})
    ),
    "weights that overflow": safe_weights(replaced("blocks.0.mlp.fc1.weight", lambda value: value.fill_(3e38))),
    "weights cut in half": cut("weights.safetensors", 0.5),
    "weights without their last bytes": cut("weights.safetensors", 0.9999),
    "weights cut in their header": cut("weights.safetensors", 0.001),
    "no byte of weights": written("weights.safetensors", b""),
    "text for weights": written("weights.safetensors", "nonsense " * 100),
    "a header that is no JSON": written("weights.safetensors", (8).to_bytes(8, "little") + b"{{{{{{{{"),
    "a header of another size": written("weights.safetensors", (2**63).to_bytes(8, "little") + b"{}"),
    "a pointer of Git LFS": written(
        "weights.safetensors", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    ),
    "a folder for weights": made_folder("weights.safetensors"),
    "a broken link for weights": link("weights.safetensors", "gone"),
    "weights that link to themselves": link("weights.safetensors", "weights.safetensors"),
    "a pipe for weights": fifo("weights.safetensors"),
    "a device for weights": link("weights.safetensors", "/dev/zero"),
    "a header of 99 MB": lambda folder: os.truncate(
        folder / "weights.safetensors", (folder / "weights.safetensors").write_bytes(HEADER_SIZE) + 99_000_000
    ),
    "compressed weights": compressed,
    "thousands of registers": lambda folder: (
        kwargs(reg_tokens=5000)(folder),
        safe_weights(lambda tensors: tensors.update(reg_token=torch.zeros(1, 5000, 48)))(folder),
    ),
    "both kinds of weights": written("weights.pth", b""),
    "a nameless file of torch's": lambda folder: (folder / "weights.safetensors").rename(folder / "weights.pth"),
    # Labels, profiles and reports
    "a folder for labels": made_folder("labels.txt"),
    "a broken link for labels": link("labels.txt", "gone"),
    "labels in Latin-1": written("labels.txt", ("größer\n" * 7).encode("latin-1")),
    "labels in UTF-16": written("labels.txt", LABELS.encode("utf-16")),
    "a label too many": written("labels.txt", f"{LABELS}another\n"),
    "no labels": written("labels.txt", ""),
    "a file for profiles": written("profiles", ""),
    "a pipe for labels": fifo("labels.txt"),
    "a device for labels": link("labels.txt", "/dev/zero"),
    "labels without end": lambda folder: ((folder / "labels.txt").touch(), os.truncate(folder / "labels.txt", 2**40)),
    "a pipe for a report": fifo("quality.json"),
    "a device for a report": link("quality.json", "/dev/urandom"),
    "a report without end": lambda folder: (
        (folder / "quality.json").touch(),
        os.truncate(folder / "quality.json", 2**40),
    ),
    "a folder for a report": made_folder("quality.json"),
    "a folder for another report": made_folder("quality-bfloat16.json"),
    "a report that links to itself": link("quality.json", "quality.json"),
    "a report that is no JSON": written("quality.json", "{"),
    "a report nested deeply": written("quality.json", "[" * 100_000),
    "a report in UTF-16": written("quality.json", "{}".encode("utf-16")),
    "a report that is a number": written("quality.json", "3"),
    "a report of null": written("quality.json", "null"),
    "levels that are none": report(levels=None),
    "levels that are a mapping": report(levels={"0": 1}),
    "an r beyond all": level(r=1e400),
    "an r of 1e308": level(r=1e308),
    "a negative r": level(r=-1),
    "an r that is true": level(r=True),
    "an r twice": level(r=0),
    "an agreement that is true": level(agreement=True),
    "an agreement of 1e-308": level(agreement=1e-308),
    "an agreement of 1e308": level(agreement=1e308),
    "infinitely many images": report(images=float("inf")),
    "images of 1e308": report(images=1e308),
    "half an image": report(images=0.5),
    "levels without end": report(levels=[{"r": 0, "agreement": 1.0}] * 20_000),
    "a type of a list": report(dtype=[]),
    "a digest of a list": report(weights_sha256=[[]]),
    "a model given twice": written("quality.json", '{"model": "a", "model": "b", "levels": []}'),
    "a schedule nested deeply": written("quality.json", '{"levels": [{"r": 0, "schedule": ' + "[" * 100_000),
    "a report in Latin-1": written("quality.json", b'{"data": "\xf6"}'),
    "a report of nothing": written("quality.json", ""),
    "a schedule of nothing": level(schedule=None),
    "a schedule without end": level(schedule=[0] * 2000),
    "an r of text": level(r="four"),
    "an agreement of NaN": level(agreement=float("nan")),
    "an agreement of a list": level(agreement=[1]),
    "an agreement above 1": level(agreement=95.2),
    "a top-1 below 0": level(top1=-1),
    "a schedule of text": level(schedule="ab"),
    "a schedule of huge numbers": level(schedule=[HUGE, HUGE]),
    "a schedule of fractions": level(schedule=[4.5, 1.5]),
    "a schedule of null": level(schedule=None),
    "a report of other weights": report(weights_sha256="0" * 64),
    "a report of an odd kind of weights": report(weights_sha256=["x"]),
    "a report of another type": report(dtype=3),
    # config.yaml
    "no settings": lambda folder: (folder / "config.yaml").unlink(),
    "a folder for settings": made_folder("config.yaml"),
    "a broken link for settings": link("config.yaml", "gone"),
    "a pipe for settings": fifo("config.yaml"),
    "a device for settings": link("config.yaml", "/dev/zero"),
    "settings without end": lambda folder: os.truncate(folder / "config.yaml", 2**40),
    "a description that is no Unicode": config_text(f'architecture: {ARCHITECTURE}\ndescription: "\\ud800"\n'),
    "a tag that is no Unicode": config_text(f'architecture: "{ARCHITECTURE}.\\ud800"\n'),
    "empty settings": config_text(""),
    "settings that are a list": config_text("- a\n- b\n"),
    "settings that are no YAML": config_text("architecture: [\n"),
    "settings of bytes": config_text(bytes(range(256))),
    "settings nested deeply": config_text("kwargs: " + "{a: " * 50_000),
    "settings that hold themselves": config_text(f"architecture: {ARCHITECTURE}\nkwargs: &a {{b: *a}}\n"),
    "aliases of aliases": config_text(
        "\n".join([f"architecture: {ARCHITECTURE}", "kwargs:", "  a0: &a0 [1]"])
        + "".join(f"\n  a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 20)}]" for n in range(1, 12))
    ),
    "an object of Python's": config_text("architecture: !!python/object/apply:os.system [true]\n"),
    "a date that isn't": config_text("architecture: 2026-02-30\n"),
    "an architecture of a number": config(architecture=3),
    "an architecture of nothing": config(architecture=""),
    "an unknown architecture": config(architecture="vit_tiny_patch16_225"),
    "an architecture of a path": config(architecture="../../etc/passwd"),
    "one that can't be merged": config(architecture="resnet18", kwargs={}),
    "an unknown tag": config(architecture=f"{ARCHITECTURE}.nonsense"),
    "arguments that are a list": config(kwargs=[1]),
    "an unknown argument": kwargs(nonsense=1),
    "a huge image": kwargs(img_size=HUGE),
    "an image of many gigabytes": kwargs(img_size=10**6),
    "an image of no size": kwargs(img_size=0),
    "an image of text": kwargs(img_size="large"),
    "patches of no size": kwargs(patch_size=0),
    "a huge number of classes": kwargs(num_classes=10**9),
    "a negative number of classes": kwargs(num_classes=-1),
    "half a class": kwargs(num_classes=1.5),
    "a huge embedding": kwargs(embed_dim=10**7),
    "registers without end": kwargs(reg_tokens=10**9),
    "an MLP without end": kwargs(mlp_ratio=1e9),
    "an MLP of NaN": kwargs(mlp_ratio=float("nan")),
    "a huge depth": kwargs(depth=10**9),
    "a negative depth": kwargs(depth=-1),
    "a depth of text": kwargs(depth="deep"),
    "no heads": kwargs(num_heads=0),
    "infinitely much dropped": kwargs(drop_rate=float("inf")),
    "a weight in the arguments": kwargs(checkpoint_path="/etc/passwd"),
    "an unknown pooling": kwargs(global_pool="mystery"),
    "an unknown layer": kwargs(norm_layer="mystery"),
    "a crop of nothing": data(crop_pct=0),
    "a crop of 1e9": data(crop_pct=1e9),
    "a crop of next to nothing": data(crop_pct=1e-9),
    "a negative crop": data(crop_pct=-1),
    "a crop of NaN": data(crop_pct=float("nan")),
    "a crop of text": data(crop_pct="all"),
    "a crop that is true": data(crop_pct=True),
    "a mean of 123": data(mean=[123.675, 116.28, 103.53]),
    "a mean of NaN": data(mean=[float("nan")] * 3),
    "a mean of text": data(mean="0.5"),
    "a mean of a mapping": data(mean={"r": 0.5}),
    "a huge mean": data(mean=[HUGE] * 3),
    "two means": data(mean=[0.5, 0.5]),
    "a deviation of 0": data(std=[0, 0, 0]),
    "a negative deviation": data(std=[-0.5] * 3),
    "a deviation of infinity": data(std=[float("inf")] * 3),
    "a deviation of 58": data(std=[58.395, 57.12, 57.375]),
    "an input of two numbers": data(input_size=[32, 32]),
    "an input of nothing": data(input_size=[3, 0, 0]),
    "a huge input": data(input_size=[3, HUGE, HUGE]),
    "an input of many gigabytes": data(input_size=[3, 10**6, 10**6]),
    "an input of fractions": data(input_size=[3, 32.5, 32.5]),
    "an input of text": data(input_size="32"),
    "another input": data(input_size=[3, 48, 48]),
    "grey images": data(input_size=[1, 32, 32]),
    "an unknown interpolation": data(interpolation="mystery"),
    "an interpolation of a number": data(interpolation=3),
    "an interpolation of nothing": data(interpolation=""),
    "a crop of a list": data(crop_mode=["center"]),
    "an unknown setting of data": data(crop=1),
    "a policy of nothing": config(policy=""),
    "a budget of nothing": config(default_budget="0s"),
    "a negative budget": config(default_budget=-1),
    "a batch of none": config(batching={"max_batch": 0}),
    "a batch of more than memory": config(batching={"max_batch": HUGE}),
    "a type of nothing": config(dtype="int4"),
    # Versions
    "a version of zero": versioned("0"),
    "a version with leading zeros": versioned("1", "02"),
    "a huge version": versioned(str(HUGE)),
    "a version in another script": versioned("٣"),
    "a choice that isn't there": versioned("1", choice="version: 2\n"),
    "a choice of text": versioned("1", choice="version: latest\n"),
    "a choice beside settings": versioned("1", choice=f"architecture: {ARCHITECTURE}\n"),
    "an empty version": lambda folder: (versioned("1")(folder), (folder / "2").mkdir()),
    "an empty folder": lambda folder: (shutil.rmtree(folder), folder.mkdir()),
}


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's, about the kinds of tensors that are made here
@pytest.mark.parametrize("spoil", ODD.values(), ids=ODD)
def test_a_faulty_folder_is_refused_in_words_that_say_where_and_no_other_model_suffers(
    spoil: Spoil, folder: Path
) -> None:
    shutil.copytree(folder, folder.with_name("good"))
    spoil(folder)
    contents = Repository(folder.parent).scan()
    assert "good" in [spec.name for spec in contents.specs]
    if "odd" in contents.faults:
        said = str(contents.faults["odd"])
    else:
        [spec] = [spec for spec in contents.specs if spec.name == "odd"]
        with pytest.raises((ModelLoadError, ConfigError)) as caught:
            load(spec, CPU)
        said = str(caught.value)
    assert str(folder) in said
    assert "Traceback" not in said
    assert len(said) < 1000


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (
            "a sparse tensor",
            "weights.pth: head.weight is a sparse tensor (torch.sparse_coo); weights are dense tensors",
        ),
        ("a quantised tensor", "weights.pth: head.weight is quantised (torch.qint8)"),
        (
            "whole numbers for a head",
            "weights.safetensors doesn't fit vit_tiny_patch16_224: not of floating point: head",
        ),
        ("complex numbers for a head", "not of floating point: head.weight"),
        ("NaN", "weights.safetensors: blocks.1.mlp.fc1.weight holds NaN"),
        ("infinity", "weights.safetensors: head.bias holds infinity"),
        ("more than float32 holds", "head.bias holds infinity"),
        ("weights that overflow", "the model's own answer is NaN or infinite"),
        ("weights cut in half", "can't be read: the file is cut short"),
        ("a pointer of Git LFS", "is a pointer of Git LFS, not the weights: git lfs pull fetches them"),
        ("a folder for labels", "odd/labels.txt is no file"),
        ("a broken link for labels", "odd/labels.txt is no file: it is a link to what isn't there"),
        ("labels in Latin-1", "labels.txt can't be read: line 1 is not UTF-8 (byte 0xf6); save it as UTF-8"),
        ("labels in UTF-16", "labels.txt can't be read: the file is UTF-16; save it as UTF-8"),
        ("a crop of nothing", "data of odd: crop_pct: 0 won't do: crop_pct is the share of the image that is kept"),
        ("a crop of 1e9", "crop_pct: 1000000000.0 won't do"),
        ("a mean of 123", "mean: [123.675, 116.28, 103.53] won't do"),
        ("a huge depth", "depth is 1000000000, and no model has more than 1000 blocks"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_is_wrong_is_named(spoil: str, says: str, folder: Path) -> None:
    ODD[spoil](folder)
    with pytest.raises((ModelLoadError, ConfigError)) as caught:
        load(read_folder(folder, "odd"), CPU)
    assert says in str(caught.value)


def test_what_lies_beside_a_models_files_or_has_odd_characters_is_no_fault(folder: Path) -> None:
    (folder / "labels.txt").write_bytes(b"\xef\xbb\xbf" + LABELS.replace("\n", "\r\n").encode())
    for name in ("README.md", ".DS_Store", "ж ünï\ncode"):
        (folder / name).touch()
    (folder / "notes").mkdir()
    (folder / "loop").symlink_to(folder)
    moved = folder.parent.rename(folder.parent.with_name("mödels of мine, \n and more")) / "odd"
    [spec] = Repository(moved.parent).scan().specs
    assert load(spec, CPU).info.labels == tuple(LABELS.splitlines())


def test_a_number_of_classes_that_is_left_out_is_that_of_the_weights(folder: Path) -> None:
    write_config(
        folder, kwargs={name: value for name, value in KWARGS.items() if name not in ("num_classes", "img_size")}
    )
    loaded = load(read_folder(folder, "odd"), CPU)
    assert loaded.info.num_classes == 7
    assert loaded.info.preprocess.settings.input_size == (3, 32, 32)


@pytest.mark.parametrize("file", ["weights.safetensors", "labels.txt", "quality.json", ""])
def test_a_model_that_is_removed_under_way_is_refused_in_words(file: str, folder: Path) -> None:
    (folder / "labels.txt").write_text(LABELS)
    report()(folder)
    spec = read_folder(folder, "odd")
    if file:
        (folder / file).unlink()
    else:
        shutil.rmtree(folder)
    for call in (lambda: outline(spec), lambda: load(spec, CPU)):
        with pytest.raises(ModelLoadError, match=str(folder)):
            call()
    if file in ("weights.safetensors", ""):
        with pytest.raises(ModelLoadError, match="can't be read: No such file"):
            weights_digest(_checkpoint(spec))


def _checkpoint(spec: ModelSpec) -> Path:
    assert spec.checkpoint is not None
    return spec.checkpoint


def test_an_outline_says_what_the_loaded_model_does(folder: Path) -> None:
    spec = read_folder(folder, "odd")
    assert outline(spec).rs == load(spec, CPU).info.rs
