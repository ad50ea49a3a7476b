"""The card: its head is what Hugging Face reads, its text what was measured."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import ModelCard, ModelCardData

from image_classifier.metrics import build_evaluation
from image_classifier.publishing.card import CardFacts, build_card, compute_wilson_interval
from tests.runs import CLASSES, build_record, draw_predictions


def build_facts(classes: tuple[str, ...] = CLASSES, int8: bool = True) -> CardFacts:
    """Build the facts of a model with an accuracy of about 80 %."""
    probabilities, labels = draw_predictions(0.8, 1000, len(classes))
    line = {"batch_size": 1, "largest_difference": 1e-6, "agreement": 1.0, "num_ties": 0, "num_at_threshold": 0}
    rates = {"fp32": 100.0, "int8": 250.0}
    eight = {"accuracy": {"fp32": 0.8, "int8": 0.79}, "images_per_second": rates, "batch_size": 64}
    return CardFacts(
        record=build_record("cifar/first", "cifar10", classes, 1000, model="airbench"),
        metrics=build_evaluation(probabilities, labels, classes, views="one", single_view=probabilities),
        parity={"fp32": [line], "int8": {**eight, "published": int8, "verdict": None if int8 else "it is not faster"}},
        license="mit",
        weights_digest="0" * 64,
        views="one",
        opset=20,
    )


def test_hugging_face_reads_the_head() -> None:
    facts = build_facts()
    data = ModelCard(build_card(facts)).data
    assert isinstance(data, ModelCardData)
    assert (data.license, data.library_name, data.pipeline_tag) == ("mit", "onnx", "image-classification")
    assert data.datasets == ["cifar10"]
    results = {result.metric_type: result for result in data.eval_results or []}
    assert results["accuracy"].metric_value == facts.metrics["accuracy"]
    assert results["accuracy"].dataset_split == "test"
    assert results["accuracy"].task_type == "image-classification"


def test_it_says_how_good_and_where_it_is_weak() -> None:
    facts = build_facts()
    text = build_card(facts)
    assert f"an accuracy of {100 * facts.metrics['accuracy']:.2f} %" in text
    for name in CLASSES:
        assert f"| {name} | {100 * facts.metrics['per_class'][name]['accuracy']:.2f} %" in text
    worst = max(
        (facts.metrics["confusion_matrix"][true][given], CLASSES[true], CLASSES[given])
        for true in range(10)
        for given in range(10)
        if true != given
    )
    assert f"- {worst[1]} predicted as {worst[2]}: {worst[0]} of 100 images (" in text
    assert "2.5 times the speed" in text
    assert "There is no `model.int8.onnx`: it is not faster." in build_card(build_facts(int8=False))


@pytest.mark.parametrize(
    ("fit", "said"),
    [
        ("squeeze", "resize other images to 32 x 32 pixels"),
        ("crop", "crop other images to the central square, and resize it to 32 x 32 pixels"),
        ("pad", "resize other images into 32 x 32 pixels with antialiasing, and pad them with black"),
        ("refuse", "The training took no images of other sizes."),
    ],
)
def test_it_says_how_images_of_other_sizes_were_fitted(fit: str, said: str) -> None:
    facts = build_facts()
    facts.record["execution"]["fit"] = fit
    assert said in build_card(facts)


def test_names_from_others_stay_text() -> None:
    text = build_card(build_facts(("<b>", "a|b", "# c\n---")))
    assert "\\<b\\>" in text
    assert "a\\|b" in text
    assert isinstance(ModelCard(text).data, ModelCardData)


@pytest.mark.parametrize(("num_right", "low", "high"), [(0, 0.0, 0.2775), (10, 0.7225, 1.0), (5, 0.2366, 0.7634)])
def test_the_interval_is_wilsons(num_right: int, low: float, high: float) -> None:
    """Against the values of R's binom.confint(methods = "wilson")."""
    assert compute_wilson_interval(num_right, 10) == pytest.approx((low, high), abs=1e-4)


def test_the_card_of_a_real_model_is_read_too(published_run: Path) -> None:
    data = ModelCard.load(published_run / "MODEL_CARD.md").data
    assert data.to_dict()["model-index"][0]["name"] == "experiment/run"
