"""A server that is left to choose the type of its weights and activations."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tests.server_process import ServerProcess
from tome_client import Client
from tome_server.models.bundled import BUNDLED
from tome_server.models.spec import quality_file


def test_a_server_left_to_choose_computes_in_the_type_that_its_log_names(
    own_server: Callable[..., ServerProcess], tmp_path: Path, samples: dict[Path, str]
) -> None:
    folder = tmp_path / "profiles"
    flags = ("--threads", "1", "--max-batch", "2", "--profile-time", "300ms", "--profiles", str(folder))
    server = own_server("--dtype", "auto", *flags)
    [(dtype, why)] = re.findall(r"fashion runs in (\w+): ([^\"\n]+)", server.log.read_text())
    assert re.search(r"\d\.\d\d times as fast", why)
    # For the next start.
    assert len(list(folder.glob("fashion-*.gains"))) == 1
    with Client(server.target, timeout=60) as client:
        model = client.model()
        result = client.predict(next(iter(samples)), r=0, features=True)
    assert model.dtype == dtype
    # The bundled model's quality was measured in both.
    levels = json.loads(quality_file(BUNDLED / "fashion", dtype).read_text())["levels"]
    assert model.r_grid[0].top1 == levels[0]["top1"]
    # What is computed in bfloat16 has nothing in the lower half of a float32.
    bits = np.array(result.features, np.float32).view(np.uint32)
    assert bool((bits & 0xFFFF).any()) == (dtype == "float32")
