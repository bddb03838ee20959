"""`tome-client visualize`."""

from __future__ import annotations

import argparse

from tome_api.parser import Parser
from tome_client.arguments import Commands
from tome_client.cli.connecting import connect
from tome_client.tables import prediction_text


def add_to(commands: Commands, parent: Parser) -> None:
    """Adds the command."""
    command = commands.add_parser(
        "visualize",
        parents=[parent],
        usage="%(prog)s [options] -o FILE IMAGE",
        help="draw which patches were merged",
        description="Draws the model's input beside its merged tokens. Each patch has the mean colour of the patches "
        "it was merged with, and lines separate the tokens. Needs Pillow: pip install 'tome-serving[visualize]'",
    )
    command.set_defaults(run=_run)
    command.add_argument("image", metavar="IMAGE", help="JPEG, PNG, WebP or BMP file")
    command.add_argument("--model", default="", metavar="NAME", help="name of the model (default: the server's first)")
    command.add_argument(
        "--r", type=int, metavar="N", help="tokens to merge in each block (default: the server chooses)"
    )
    command.add_argument("-o", "--output", required=True, metavar="FILE", help="file to write the picture to")


def _run(args: argparse.Namespace) -> int:
    """Draws an image beside its merged tokens."""
    # Here because Pillow, which it imports, is not part of the plain install.
    from tome_client.visualize import picture_of

    with connect(args) as client:
        result = client.predict(args.image, model=args.model, r=args.r, top_k=1, token_map=True)
        expects = client.model(result.model).input
    if result.token_map is None:
        raise ValueError(f"{args.target} sent no token map")
    picture_of(args.image, expects, result.token_map).save(args.output)
    merging = result.merging
    print(
        f"{args.output}: {', '.join(prediction_text(one) for one in result.predictions)}; "
        f"r {merging.r}, {merging.tokens_in} → {merging.tokens_out} tokens, "
        f"{merging.saved_share:.1%} of FLOPs saved"
    )
    return 0
