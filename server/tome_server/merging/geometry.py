"""How many patches an image has, and which images a model takes."""

from timm.layers import HybridEmbed

from tome_server.merging.support import VisionModel, embedding_of


def default_size(model: VisionModel) -> tuple[int, int]:
    """Return height and width, in pixels, of the images that `model` was made for."""
    embedding = embedding_of(model)
    size = getattr(embedding, "img_size", None)
    if size is None:  # timm's NaFlexVit takes any; its weights were made for one, or its positions learned on one grid
        wanted = (getattr(model, "pretrained_cfg", None) or {}).get("input_size")
        if wanted is not None:
            return int(wanted[1]), int(wanted[2])
        rows, columns = embedding.pos_embed_grid_size
        size = (rows * embedding.patch_size[0], columns * embedding.patch_size[1])
    return int(size[0]), int(size[1])


def patch_grid(model: VisionModel, height: int, width: int) -> tuple[int, int]:
    """Return the patches from top to bottom and from left to right of an image of this size in pixels."""
    embedding = embedding_of(model)
    if type(embedding) is HybridEmbed and (height, width) == tuple(embedding.img_size):
        rows, columns = embedding.grid_size  # as the stem gave it; a stem may round up where the rest rounds down
    else:
        rows, columns = embedding.dynamic_feat_size((height, width))
    return int(rows), int(columns)


def check_image_size(model: VisionModel, height: int, width: int) -> None:
    """Raise ValueError unless `model` takes images of this size in pixels."""
    embedding = embedding_of(model)
    own = getattr(embedding, "img_size", None)
    if own is not None and embedding.strict_img_size and (height, width) != tuple(own):
        raise ValueError(f"images must be {own[0]}×{own[1]} pixels, not {height}×{width}")
    patch: tuple[int, int] = embedding.patch_size
    if type(embedding) is HybridEmbed:
        if (height, width) == tuple(embedding.img_size):
            return
        patch = embedding.feat_ratio(as_scalar=False)
    elif embedding.dynamic_img_pad:
        return
    if height % patch[0] or width % patch[1]:
        raise ValueError(f"images of {height}×{width} pixels don't divide into patches of {tuple(patch)}")
