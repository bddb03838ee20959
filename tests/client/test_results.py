import json
import struct
from dataclasses import FrozenInstanceError, asdict

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration

from tests.client.peer import MODEL, status
from tome_api.v1 import inference_pb2
from tome_client.results import (
    ImageInput,
    MergeLevel,
    Merging,
    PatchFeatures,
    Prediction,
    Timing,
    TokenMap,
    model_info,
    predict_result,
    stream_result,
)

FULL = inference_pb2.PredictResponse(
    model="fashion",
    predictions=[
        inference_pb2.Prediction(class_id=4, label="Coat", score=0.75),
        inference_pb2.Prediction(class_id=2, score=0.25),
    ],
    merging=inference_pb2.Merging(r=4, tokens_in=50, tokens_out=26, flops=60, flops_saved=40),
    timing=inference_pb2.Timing(
        decode=Duration(nanos=1_500_000),
        queue=Duration(nanos=250_000),
        compute=Duration(nanos=10_000_000),
        total=Duration(seconds=1, nanos=250_000_000),
        slack=Duration(nanos=-5_000_000),
        batch_size=3,
        predicted=Duration(nanos=9_500_000),
    ),
    features=[0.5, -0.25],
    token_map=inference_pb2.TokenMap(grid_height=1, grid_width=3, token=[1, 1, 2]),
)


def test_every_field_of_an_answer_is_read() -> None:
    result = predict_result(FULL)
    assert result.model == "fashion"
    assert result.predictions == (Prediction(4, "Coat", 0.75), Prediction(2, "", 0.25))
    assert result.merging == Merging(r=4, tokens_in=50, tokens_out=26, flops=60, flops_saved=40)
    assert result.timing == Timing(
        decode=0.0015, queue=0.00025, compute=0.01, total=1.25, slack=-0.005, batch_size=3, predicted=0.0095
    )
    assert result.features == (0.5, -0.25)
    assert result.token_map == TokenMap(grid_height=1, grid_width=3, token=(1, 1, 2))


@pytest.mark.parametrize(("kind", "code"), [("DATA_TYPE_FLOAT16", "e"), ("DATA_TYPE_FLOAT32", "f")])
def test_features_are_read_whatever_their_type(kind: str, code: str) -> None:
    values = (0.5, -0.25, 2.0, 0.0, 1.5, -8.0)
    type_ = inference_pb2.Tensor.DataType.Value(kind)
    pooled = inference_pb2.Tensor(data_type=type_, shape=[2], data=struct.pack(f"<2{code}", *values[:2]))
    patches = inference_pb2.Tensor(data_type=type_, shape=[1, 3, 2], data=struct.pack(f"<6{code}", *values))
    result = predict_result(inference_pb2.PredictResponse(features_float16=pooled, patch_features=patches))
    assert result.features == values[:2]
    assert result.patch_features == PatchFeatures(1, 3, 2, values)


def test_what_was_not_asked_for_is_none() -> None:
    result = predict_result(inference_pb2.PredictResponse())
    assert result.features is None
    assert result.patch_features is None
    assert result.token_map is None
    assert result.timing.slack is None


def test_no_slack_at_all_differs_from_no_deadline() -> None:
    timing = inference_pb2.Timing(slack=Duration())
    assert predict_result(inference_pb2.PredictResponse(timing=timing)).timing.slack == 0.0


def test_the_share_saved_is_of_the_unmerged_model() -> None:
    assert predict_result(FULL).merging.saved_share == pytest.approx(0.4)
    assert Merging(r=0, tokens_in=1, tokens_out=1, flops=0, flops_saved=0).saved_share == 0.0


def test_results_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        predict_result(FULL).merging.r = 8


def test_results_are_written_as_json() -> None:
    assert json.loads(json.dumps(asdict(predict_result(FULL))))["token_map"]["token"] == [1, 1, 2]


def test_a_stream_result_has_a_result_or_an_error() -> None:
    answered = stream_result(inference_pb2.PredictStreamResponse(id="a", response=FULL))
    assert (answered.id, answered.result, answered.error) == ("a", predict_result(FULL), None)

    refused = status(grpc.StatusCode.NOT_FOUND, "no such model")
    failed = stream_result(inference_pb2.PredictStreamResponse(id="b", error=refused))
    assert (failed.id, failed.result) == ("b", None)
    assert str(failed.error) == "NOT_FOUND: no such model"


def test_a_model_is_read_and_what_was_not_measured_is_none() -> None:
    model = model_info(inference_pb2.GetModelResponse(model=MODEL))
    assert model.summary.name == "fashion"
    assert model.summary.ready
    assert model.input == ImageInput(1, 28, 28, (0.5,), (0.5,), "bicubic", 1.0, "center")
    assert model.labels == ("Trouser", "Coat")
    assert (model.num_classes, model.feature_dim) == (2, 192)
    assert (model.policy, model.default_budget, model.dtype) == ("floor", 0.1, "bfloat16")
    assert model.r_grid == (
        MergeLevel(r=0, macs=20_000_000, tokens_out=50, top1=0.91, agreement=1.0, latency=0.00425),
        MergeLevel(r=4, macs=12_345_678, tokens_out=26, top1=None, agreement=None, latency=None),
    )
