"""The number of patches in an image, and the image sizes that a model accepts."""

from timm.layers import HybridEmbed

from tome_server.merging.support import VisionModel, embedding_of


def default_size(model: VisionModel) -> tuple[int, int]:
    """Return the height and width in pixels of the images that `model` was made for."""
    embedding = embedding_of(model)
    size = getattr(embedding, "img_size", None)
    if size is None:  # timm's NaFlexVit takes any size; its weights or its learned positions were made for one
        pretrained = (getattr(model, "pretrained_cfg", None) or {}).get("input_size")
        if pretrained is not None:
            return int(pretrained[1]), int(pretrained[2])
        rows, columns = embedding.pos_embed_grid_size
        size = (rows * embedding.patch_size[0], columns * embedding.patch_size[1])
    return int(size[0]), int(size[1])


def patch_grid(model: VisionModel, height: int, width: int) -> tuple[int, int]:
    """Return the rows and columns of patches in an image of this height and width in pixels."""
    embedding = embedding_of(model)
    if type(embedding) is HybridEmbed and (height, width) == tuple(embedding.img_size):
        rows, columns = embedding.grid_size  # measured by timm; dynamic_feat_size rounds down where a stem rounds up
    else:
        rows, columns = embedding.dynamic_feat_size((height, width))
    return int(rows), int(columns)


def check_image_size(model: VisionModel, height: int, width: int) -> None:
    """Raise ValueError unless `model` accepts images of this height and width in pixels."""
    embedding = embedding_of(model)
    fixed = getattr(embedding, "img_size", None)
    if fixed is not None and embedding.strict_img_size and (height, width) != tuple(fixed):
        raise ValueError(f"images must be {fixed[0]}×{fixed[1]} pixels, not {height}×{width}")
    patch: tuple[int, int] = embedding.patch_size
    if type(embedding) is HybridEmbed:
        if (height, width) == tuple(embedding.img_size):
            return
        patch = embedding.feat_ratio(as_scalar=False)
    elif embedding.dynamic_img_pad:
        return
    if height % patch[0] or width % patch[1]:
        raise ValueError(f"images of {height}×{width} pixels don't divide into patches of {tuple(patch)}")
