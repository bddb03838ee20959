"""Models go in and out of service by Triton's repository calls, while others are served."""

import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from . import triton
from .wire import until


def state(client: Any) -> dict[str, str]:
    return {model.name: model.state for model in client.get_model_repository_index().models}


def test_a_model_goes_and_comes_back_and_the_other_never_fails(
    own_server: Callable[..., Any], tmp_path: Path, file: Path
) -> None:
    config = tmp_path / "config.yaml"
    models = [{"source": "bundled:fashion", "name": name, "default_budget": "60s"} for name in ("stays", "goes")]
    config.write_text(yaml.safe_dump({"models": models, "model_control": True}))
    target = own_server("--config", str(config), "--profile-time", "500ms").target
    image = triton.client.InferInput("image", [1], "BYTES")
    image.set_data_from_numpy(np.array([file.read_bytes()], object))
    codes: dict[str, Counter[str]] = {"stays": Counter(), "goes": Counter()}
    over = threading.Event()

    def ask(name: str) -> None:
        with triton.client.InferenceServerClient(target) as client:
            while not over.is_set():
                try:
                    client.infer(name, [image], outputs=[triton.client.InferRequestedOutput("class_id")])
                    codes[name]["OK"] += 1
                except triton.InferenceServerException as error:
                    codes[name][str(error.status())] += 1
                    over.wait(0.01)

    askers = [threading.Thread(target=ask, args=[name]) for name in ("stays", "goes")]
    with triton.client.InferenceServerClient(target) as client:
        for asker in askers:
            asker.start()
        try:
            until(lambda: codes["stays"]["OK"] > 5 and codes["goes"]["OK"] > 5, "both are served")
            client.unload_model("goes")
            assert state(client) == {"stays": "READY"}
            assert not client.is_model_ready("goes")
            assert client.is_server_ready()
            until(lambda: codes["goes"]["StatusCode.NOT_FOUND"] > 5, "it is gone")
            with pytest.raises(triton.InferenceServerException, match="no model is named 'goes'"):
                client.unload_model("goes")
            client.load_model("goes")
            client.load_model("goes")  # it is there, so nothing happens
            assert state(client) == {"stays": "READY", "goes": "READY"}
            again = codes["goes"]["OK"]
            until(lambda: codes["goes"]["OK"] > again + 5, "it is served again")
            with pytest.raises(triton.InferenceServerException, match="no model is named 'nobody'"):
                client.load_model("nobody")
            with pytest.raises(triton.InferenceServerException, match="model_name: is missing"):
                client.unload_model("")
        finally:
            over.set()
            for asker in askers:
                asker.join()
    assert set(codes["stays"]) == {"OK"}
    assert set(codes["goes"]) <= {"OK", "StatusCode.NOT_FOUND", "StatusCode.UNAVAILABLE"}
