from tests.client.peer import MODEL, answer
from tome_api.v1 import inference_pb2
from tome_client.results import ModelSummary, Prediction, model_info, predict_result
from tome_client.tables import model_details, model_table, prediction_header, prediction_line, prediction_text


def test_a_prediction_without_a_label_shows_its_class() -> None:
    assert prediction_text(Prediction(7, "", 0.126)) == "#7 0.13"
    assert prediction_text(Prediction(7, "Sneaker", 1.0)) == "Sneaker 1.00"


def test_predictions_are_a_line_an_image_in_aligned_columns() -> None:
    result = predict_result(answer(inference_pb2.PredictRequest(r=8, top_k=2)))
    assert [prediction_header(10), prediction_line(10, "a.png", result, 0.0151)] == [
        "image         r       tokens  FLOPs saved      server  round trip  predictions",
        "a.png         8    197 → 101        40.0%     12.3 ms     15.1 ms  Coat 0.75, Trouser 0.25",
    ]
    assert prediction_line(10, "longer.png", result, 12.5) == (
        "longer.png    8    197 → 101        40.0%     12.3 ms  12500.0 ms  Coat 0.75, Trouser 0.25"
    )


def test_models_are_a_line_each() -> None:
    listed = [ModelSummary("a", "vit", "Clothes", True), ModelSummary("bb", "deit", "", False)]
    assert model_table(listed) == (
        "name  architecture  ready    description\na     vit           yes      Clothes\nbb    deit          loading"
    )


def test_no_models_are_a_header_alone() -> None:
    assert model_table([]) == "name  architecture  ready  description"


def test_a_model_shows_what_each_r_costs_and_a_dash_for_what_was_not_measured() -> None:
    shown = model_details(model_info(inference_pb2.GetModelResponse(model=MODEL)))
    facts, levels = shown.split("\n\n")
    assert "classes         2 (Trouser, Coat)" in facts
    assert "policy          floor" in facts
    assert "dtype           bfloat16" in facts
    assert "default budget  100ms" in facts
    assert "input           1 channels, 28 high, 28 wide; bicubic, center crop 1" in facts
    assert levels == (
        "r  GMACs  tokens  latency   top-1  agreement\n"
        "0  0.020      50   4.2 ms  91.00%    100.00%\n"
        "4  0.012      26        -       -          -"
    )


def test_a_model_whose_requests_have_no_deadline_says_so() -> None:
    model = inference_pb2.Model()
    model.CopyFrom(MODEL)
    model.ClearField("default_budget")
    described = model_info(inference_pb2.GetModelResponse(model=model))
    assert described.default_budget is None
    assert "default budget  none\n" in model_details(described)


def test_of_many_labels_ten_are_shown() -> None:
    model = inference_pb2.Model(
        labels=[f"label{number}" for number in range(1000)],
        num_classes=1000,
        input=inference_pb2.ImageInput(crop_pct=0.875),
    )
    shown = model_details(model_info(inference_pb2.GetModelResponse(model=model)))
    assert "1000 (label0, " in shown
    assert "label9, …)" in shown
