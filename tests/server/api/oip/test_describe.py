"""Models in the protocol's words."""

from dataclasses import replace
from typing import Any

import pytest

from tests.server.scripted import QUICK, Bench, profile_of
from tome_server.api.oip.describe import model_config
from tome_server.models.model_info import ModelInfo
from tome_server.serving.served import ServedModel


@pytest.mark.parametrize("division", ["", "images", "images and blocks"])
async def test_the_configuration_says_in_what_a_model_runs_and_what_threads_divide_where_they_do(
    bundled: ModelInfo, bench: Bench, division: str
) -> None:
    model = replace(bundled, division=division, dtype="bfloat16")
    served: ServedModel[Any] = ServedModel(model, profile_of(QUICK, 8), "price")
    said = {name: value["string_value"] for name, value in model_config(served, bench.engine)["parameters"].items()}
    assert said["dtype"] == "bfloat16"
    assert said.get("threads_divide", "") == division
