import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from tome_api.v1 import inference_pb2 as pb
from tome_server.api.oip.messages import DTYPES, AsBytes, RequestedOutput
from tome_server.api.oip.outputs import check_size, tensors_of, wanted_of
from tome_server.api.oip.parameters import Terms
from tome_server.api.rpc.convert import response_to
from tome_server.errors import InvalidRequestError, TooLargeError
from tome_server.execution.batch import ItemResult
from tome_server.mac_count import MacCount
from tome_server.models.model_info import ModelInfo
from tome_server.models.preprocess import Limits, Preprocess
from tome_server.models.transform import ImageSettings
from tome_server.observability.request_outcome import Timing
from tome_server.serving.requests import Reply

PATCHES, DIM = (2, 3), 4
SETTINGS = ImageSettings((3, 4, 6), (0.0,) * 3, (1.0,) * 3, "bicubic", 1.0, "center")
MODEL = ModelInfo(
    name="small",
    architecture="none",
    preprocess=Preprocess(SETTINGS, Limits(1, 1)),
    num_classes=0,
    feature_dim=DIM,
    patch_grid=PATCHES,
    costs=(MacCount(1, 1, 0, 7, (7,)),),
    rs=(0,),
)
VALUES = st.floats(-1e6, 1e6, width=32)
BYTES = AsBytes(every=True)


def reply(features: np.ndarray, patches: np.ndarray, token_map: np.ndarray) -> Reply:
    result = ItemResult((), (), features.tobytes(), token_map.tobytes(), None, patches.tobytes())
    return Reply(MODEL, result, 0, MODEL.cost(0), Timing(0, 0, 0, 0, 0, 0, 1))


@given(
    arrays("<f4", (2, DIM), elements=VALUES),
    arrays("<f4", (2, 6, DIM), elements=VALUES),
    arrays("<i4", (2, 6), elements=st.integers(1, 6)),
    st.booleans(),
    st.booleans(),
)
def test_of_the_same_images_both_protocols_say_the_same(
    features: np.ndarray, patches: np.ndarray, token_map: np.ndarray, normalize: bool, float16: bool
) -> None:
    replies = [reply(*each) for each in zip(features, patches, token_map, strict=True)]
    asked = pb.PredictRequest(normalize_features=normalize, float16_features=float16)
    own = [response_to(one, asked) for one in replies]
    names = ("features", "patch_features", "token_map")
    terms = Terms(normalize_features=normalize, float16_features=float16)
    wanted = wanted_of(MODEL, [RequestedOutput(name) for name in names], terms, BYTES)
    theirs = {tensor.name: tensor for tensor in tensors_of(replies, wanted)}
    assert {name: (tensor.datatype, tensor.shape) for name, tensor in theirs.items()} == {
        "features": ("FP16" if float16 else "FP32", (2, DIM)),
        "patch_features": ("FP16" if float16 else "FP32", (2, 6, DIM)),
        "token_map": ("INT32", (2, 6)),
    }
    if float16:
        assert theirs["features"].data == b"".join(one.features_float16.data for one in own)
    else:
        assert theirs["features"].data == np.array([one.features for one in own], "<f4").tobytes()
    assert theirs["patch_features"].data == b"".join(one.patch_features.data for one in own)
    found = np.frombuffer(theirs["token_map"].data, DTYPES["INT32"]).reshape(2, 6)
    assert found.tolist() == [list(one.token_map.token) for one in own]


def test_patches_and_token_maps_come_only_to_those_who_name_them() -> None:
    assert [one.output.name for one in wanted_of(MODEL, [], Terms(), BYTES)] == ["features"]


def test_float16_is_for_answers_in_bytes() -> None:
    terms = Terms(float16_features=True)
    for names in ((), ("features",), ("token_map", "patch_features")):
        requested = [RequestedOutput(name) for name in names]
        assert wanted_of(MODEL, requested, terms, BYTES)[-1].output.datatype == "FP16"
        with pytest.raises(InvalidRequestError, match=r"parameters\.float16_features: .* travels as bytes alone"):
            wanted_of(MODEL, requested, terms, AsBytes(every=False))
    # Each output by itself.
    mixed = AsBytes(every=True, named={"features": False})
    wanted_of(MODEL, [RequestedOutput("patch_features")], terms, mixed)
    with pytest.raises(InvalidRequestError, match="features can't come as FP16 here"):
        wanted_of(MODEL, [RequestedOutput("patch_features"), RequestedOutput("features")], terms, mixed)


def test_an_answer_larger_than_any_is_refused() -> None:
    wanted = wanted_of(MODEL, [RequestedOutput("patch_features")], Terms(), BYTES)
    most = 2**28 // (4 * 6 * DIM)
    check_size(wanted, most, BYTES)
    with pytest.raises(TooLargeError, match="would take 268,435,488 bytes; an answer holds at most 268,435,456"):
        check_size(wanted, most + 1, BYTES)
    # Half of the bytes are room for twice as many images; element by element for less.
    halved = wanted_of(MODEL, [RequestedOutput("patch_features")], Terms(float16_features=True), BYTES)
    check_size(halved, 2 * most, BYTES)
    with pytest.raises(TooLargeError, match="other than as bytes"):
        check_size(wanted, most, AsBytes(every=False))
