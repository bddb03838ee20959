"""The Open Inference Protocol over gRPC, as the load generator speaks it to Triton, KServe and others, and to us."""

from __future__ import annotations

import math
import struct
from array import array
from collections.abc import Mapping
from dataclasses import dataclass

import grpc

from tome_api.oip import open_inference_pb2 as oip
from tome_api.oip import open_inference_pb2_grpc as oip_grpc
from tome_client.channel import Metadata
from tome_client.errors import TomeError, error_from_rpc
from tome_client.load.images import Sample
from tome_client.load.plan import LoadPlan, OpenInference
from tome_client.load.wire import CONNECT_TIMEOUT, Answer
from tome_client.requests import PredictOptions
from tome_client.results import ImageInput, Merging, ModelInfo, ModelSummary

DATATYPES = ("BYTES", "UINT8", "FP32")
"""What an image can be sent as."""

# As our server calls itself. It takes encoded files, which its metadata does not mention, and reports what it merged.
_OURS = "tome-serving"

# How Triton says that a request waited too long or found the queue full; it sends UNAVAILABLE for both.
_TRITON_ENDINGS = {
    "Request timeout expired": ("DEADLINE_EXCEEDED", "EXPIRED"),
    "Exceeds maximum queue size": ("RESOURCE_EXHAUSTED", None),
}

# Channels of grey, RGB and RGBA images, which tell [H, W, C] from [C, H, W].
_CHANNELS = (1, 3, 4)


@dataclass(frozen=True, slots=True)
class TensorForm:
    """The input tensor that one image becomes."""

    name: str
    datatype: str
    dims: tuple[int, ...]
    """As the server describes it, the batch included; -1 for any size."""


@dataclass(frozen=True, slots=True)
class OpenInferenceWire:
    """The Open Inference Protocol, for one model."""

    model: ModelInfo
    request_options: PredictOptions
    settings: OpenInference
    form: TensorForm
    ours: bool
    """Whether the server is tome-serving."""
    names_classes: bool
    """Whether answers have an output "label" with the class's name."""
    outputs: tuple[str, ...]
    """The outputs that are asked for; empty for all."""
    scores: str | None
    """The output with one value for each class; None if there is none. Not used where answers name the class."""
    method: str = "/inference.GRPCInferenceService/ModelInfer"

    def options(self, budget: float) -> bytes:
        """Returns the message of a request without its image. The budget is the call's own deadline."""
        request = oip.ModelInferRequest(
            model_name=self.model.summary.name,
            outputs=[oip.ModelInferRequest.InferRequestedOutputTensor(name=name) for name in self.outputs],
        )
        for name in ("r", "min_r", "max_r"):
            if (count := self.request_options.get(name)) is not None:
                request.parameters[name].int64_param = int(str(count))
        if (quality := self.request_options.get("min_quality")) is not None:
            request.parameters["min_quality"].double_param = quality
        if self.ours and budget == math.inf:
            request.parameters["no_deadline"].bool_param = True
        return request.SerializeToString()

    def image(self, sample: Sample) -> bytes:
        """Returns the message that holds an image alone."""
        shape, data = _tensor(sample, self.form, self.settings)
        tensor = oip.ModelInferRequest.InferInputTensor(name=self.form.name, datatype=self.form.datatype, shape=shape)
        return oip.ModelInferRequest(inputs=[tensor], raw_input_contents=[data]).SerializeToString()

    def judged(self, sample: Sample) -> bool:
        """Whether answers say the class as the label does: by name, or by index."""
        if sample.label is None:
            return False
        return self.names_classes or (self.scores is not None and sample.label.isdecimal())

    def read(self, answer: bytes, sample: Sample) -> Answer:
        """Reads an answer. Only our own server reports what it merged."""
        response = oip.ModelInferResponse.FromString(answer)
        right = sample.label in self._classes(response) if self.judged(sample) else None
        return Answer(_merging(response.parameters) if self.ours else None, None, right)

    def ending(self, error: TomeError) -> tuple[str, str | None]:
        """Returns the code and the reason of a failure, in our server's terms."""
        if error.code is grpc.StatusCode.UNAVAILABLE:
            for text, ending in _TRITON_ENDINGS.items():
                if text in error.message:
                    return ending
        return error.code.name, error.reason

    def _classes(self, response: oip.ModelInferResponse) -> set[str]:
        """Returns the name and the index of the best class, as far as the answer says them."""
        found: set[str] = set()
        for position, output in enumerate(response.outputs):
            raw = response.raw_output_contents[position] if response.raw_output_contents else None
            if self.names_classes and output.name == "label":
                found.add(_text(raw, output))
            elif self.names_classes and output.name == "class_id":
                found.add(str(struct.unpack("<q", raw)[0] if raw else output.contents.int64_contents[0]))
            elif not self.names_classes and output.name == self.scores:
                values = array("f", raw) if raw else array("f", output.contents.fp32_contents)
                found.add(str(max(range(len(values)), key=values.__getitem__)))
        return found


async def describe_open_inference(
    channel: grpc.aio.Channel, plan: LoadPlan, target: str, metadata: Metadata
) -> OpenInferenceWire:
    """Has the server describe itself and the model.

    Raises:
        TomeError: The server did not.
        ValueError: The model's input is none that an image can be sent to.
    """
    assert plan.oip
    # The stub is typed for blocking channels alone.
    stub = oip_grpc.GRPCInferenceServiceStub(channel)
    wanted = oip.ModelMetadataRequest(name=plan.options.get("model", ""))
    try:
        server = await stub.ServerMetadata(oip.ServerMetadataRequest(), timeout=CONNECT_TIMEOUT, metadata=metadata)
        model = await stub.ModelMetadata(wanted, timeout=CONNECT_TIMEOUT, metadata=metadata)
    except grpc.RpcError as failure:
        error = error_from_rpc(failure, target)
        if error.code is grpc.StatusCode.UNIMPLEMENTED:
            error = TomeError(error.code, f"{target} does not speak the Open Inference Protocol over gRPC")
        elif not wanted.name and error.code in (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.INVALID_ARGUMENT):
            error = TomeError(error.code, f"{error.message}; name the model with --model")
        raise error from failure
    ours = server.name == _OURS
    form = _form(model, plan.oip, ours=ours)
    scores = next((one for one in model.outputs if _classes_of(one)), None)
    # Those that our own API returns in the same run.
    named = tuple(one.name for one in model.outputs if ours and one.name in ("class_id", "label"))
    return OpenInferenceWire(
        model=_model_info(model, form, scores),
        request_options=plan.options,
        settings=plan.oip,
        form=form,
        ours=ours,
        names_classes=bool(named),
        outputs=named,
        scores=scores.name if scores else None,
    )


def _form(model: oip.ModelMetadataResponse, settings: OpenInference, *, ours: bool) -> TensorForm:
    """Returns the input that images are sent to. Raises ValueError if there is none."""
    names = ", ".join(one.name for one in model.inputs)
    chosen = [one for one in model.inputs if settings.input in ("", one.name)]
    if not chosen:
        raise ValueError(f"{model.name} has no input {settings.input!r}; it has {names or 'none'}: see --input")
    if len(chosen) > 1 or (len(model.inputs) > 1 and not settings.input):
        raise ValueError(f"{model.name} has several inputs: choose one of {names} with --input")
    (tensor,) = chosen
    datatype = settings.datatype or ("BYTES" if ours else tensor.datatype)
    if datatype not in DATATYPES:
        raise ValueError(
            f"the input {tensor.name} of {model.name} takes {datatype}; an image can be sent as BYTES, UINT8 or FP32"
        )
    dims = tuple(tensor.shape)
    if ours and datatype != "FP32":
        # The metadata is that of FP32; docs/open-inference-protocol.md has the other two.
        dims = (-1,) if datatype == "BYTES" else (-1, *dims[-2:], 3)
    if datatype == "BYTES":
        fits = all(size in (-1, 1) for size in dims)
    else:
        fits = len(dims) in (3, 4) and (len(dims) == 3 or dims[0] in (-1, 1)) and _layout(dims) is not None
    if not fits:
        raise ValueError(
            f"the input {tensor.name} of {model.name} has the shape {list(dims)}, which takes no single image as "
            f"{datatype}"
        )
    return TensorForm(tensor.name, datatype, dims)


def _layout(dims: tuple[int, ...]) -> tuple[bool, int, int, int] | None:
    """Returns whether channels come first, and channels, height and width; None if no size can be that of channels."""
    first, middle, last = dims[-3:]
    if first in _CHANNELS:
        return True, first, middle, last
    if last in _CHANNELS:
        return False, last, first, middle
    return None


def _tensor(sample: Sample, form: TensorForm, settings: OpenInference) -> tuple[list[int], bytes]:
    """Returns an image as a tensor: its shape, and its elements as the protocol's bytes."""
    batch = [1] * (len(form.dims) - 3)
    if form.datatype == "BYTES":
        return [1] * max(1, len(form.dims)), struct.pack("<I", len(sample.data)) + sample.data
    layout = _layout(form.dims)
    assert layout
    channels_first, channels, height, width = layout
    # Here because Pillow, which it imports, is not part of the plain install.
    from tome_client.load.pixels import planes

    size = (width, height) if width > 0 and height > 0 else None
    (width, height), parts = planes(
        sample, channels, size, normalised=form.datatype == "FP32", mean=settings.mean, std=settings.std
    )
    if channels_first:
        return [*batch, channels, height, width], b"".join(parts)
    # One plane after the other becomes one pixel after the other.
    pixels = array("f" if form.datatype == "FP32" else "B", bytes(sum(map(len, parts))))
    for channel, part in enumerate(parts):
        pixels[channel::channels] = array(pixels.typecode, part)
    return [*batch, height, width, channels], pixels.tobytes()


def _classes_of(output: oip.ModelMetadataResponse.TensorMetadata) -> int:
    """Returns the number of classes if an output has one value for each; 0 if it has not."""
    batch, last = tuple(output.shape)[:-1], tuple(output.shape)[-1:]
    fits = output.datatype == "FP32" and len(batch) <= 1 and all(size in (-1, 1) for size in batch)
    return last[0] if fits and last and last[0] > 1 else 0


def _model_info(
    model: oip.ModelMetadataResponse, form: TensorForm, scores: oip.ModelMetadataResponse.TensorMetadata | None
) -> ModelInfo:
    """Returns what is known of a model; the rest is empty."""
    _, channels, height, width = (form.datatype != "BYTES" and _layout(form.dims)) or (True, 0, 0, 0)
    return ModelInfo(
        summary=ModelSummary(name=model.name, architecture=model.platform, description="", ready=True),
        input=ImageInput(
            channels=channels,
            height=max(height, 0),
            width=max(width, 0),
            mean=(),
            std=(),
            interpolation="",
            crop_pct=1.0,
            crop_mode="",
        ),
        labels=(),
        num_classes=_classes_of(scores) if scores else 0,
        feature_dim=0,
        policy="",
        default_budget=None,
        r_grid=(),
    )


def _merging(parameters: Mapping[str, oip.InferParameter]) -> Merging | None:
    names = ("r", "tokens_in", "tokens_out", "flops", "flops_saved")
    if not all(name in parameters for name in names):
        return None
    return Merging(**{name: parameters[name].int64_param for name in names})


def _text(raw: bytes | None, output: oip.ModelInferResponse.InferOutputTensor) -> str:
    # Four bytes of length come before an element.
    return (raw[4:] if raw else output.contents.bytes_contents[0]).decode(errors="replace")
