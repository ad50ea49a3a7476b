"""MODEL_CARD.md: description, metrics, weaknesses and checks of a published model.

Its head is the metadata of Hugging Face's model cards (https://huggingface.co/docs/hub/model-cards); its text follows
Mitchell et al.: Model Cards for Model Reporting, 2019.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import yaml

from image_classifier.image_sizes import DEFAULT_IMAGE_SIZE
from image_classifier.metrics import MIN_TOP5_CLASSES
from image_classifier.published.folder import INT8_MODEL, MODEL, PARITY, SIGNATURE
from image_classifier.text import make_printable
from image_classifier.tracking.record import describe_checkers, describe_head

NUM_WEAKNESSES = 5
_Z = 1.959964  # of a 95 % interval


@dataclass(frozen=True)
class CardFacts:
    """What a card is written from.

    Attributes:
        record: run.json.
        metrics: of the published model's own answers on the test set.
        parity: parity.json.
        license: identifier of the licence of the weights.
        weights_digest: of the run.
        views: that are averaged in the graph.
        image_size: side in pixels of the images that the graph takes.
    """

    record: dict[str, Any]
    metrics: dict[str, Any]
    parity: dict[str, Any]
    license: str
    weights_digest: str
    views: str
    opset: int
    image_size: int = DEFAULT_IMAGE_SIZE


def build_card(facts: CardFacts) -> str:
    """Build the card as Markdown with a head in YAML."""
    head = yaml.safe_dump(_build_metadata(facts), sort_keys=False, allow_unicode=True)
    sections = {
        "Use": _describe_use(facts),
        "Data": _describe_data(facts),
        "Training": _describe_training(facts),
        "Results": _describe_results(facts),
        "Weaknesses": _describe_weaknesses(facts),
        "Limits": _LIMITS.format(size=_describe_size(facts)),
        "Proof": _describe_proof(facts),
    }
    name = f"{facts.record['experiment_name']}/{facts.record['run_name']}"
    body = "\n\n".join(f"## {title}\n\n{text}" for title, text in sections.items())
    return f"---\n{head}---\n\n# {_escape(name)}\n\n{_describe(facts)}\n\n{body}\n"


def compute_wilson_interval(num_right: float, num_images: int) -> tuple[float, float]:
    """Compute the 95 % interval of a rate (Wilson, Journal of the American Statistical Association 22, 1927)."""
    rate, z2 = num_right / num_images, _Z**2 / num_images
    centre, margin = rate + z2 / 2, math.sqrt(rate * (1 - rate) * z2 + z2**2 / 4)
    return (centre - margin) / (1 + z2), (centre + margin) / (1 + z2)


def _build_metadata(facts: CardFacts) -> dict[str, Any]:
    record, metrics = facts.record, facts.metrics
    name = f"{record['experiment_name']}/{record['run_name']}"
    figures = {"accuracy": metrics["accuracy"], "f1": metrics["macro"]["f1"], "loss": metrics["loss"]}
    dataset = {"name": record["data"]["name"], "type": record["data"]["name"], "split": "test"}
    dataset["revision"] = record["data"]["digest"]
    return {
        "license": facts.license,
        "library_name": "onnx",
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "onnx", record["settings"]["model"]],
        "datasets": [record["data"]["name"]],
        "metrics": list(figures),
        "model-index": [
            {
                "name": name,
                "results": [
                    {
                        "task": {"type": "image-classification", "name": "Image classification"},
                        "dataset": dataset,
                        "metrics": [{"type": kind, "value": value} for kind, value in figures.items()],
                    }
                ],
            }
        ],
    }


def _describe(facts: CardFacts) -> str:
    record = facts.record
    low, high = _interval(facts.metrics["accuracy"], facts.metrics["num_images"])
    return (
        f"A network of the kind `{record['settings']['model']}` that tells {len(record['data']['classes'])} classes of "
        f"images of {_describe_size(facts)} pixels apart, with an accuracy of {_percent(facts.metrics['accuracy'])} "
        f"({low} to {high}) on {facts.metrics['num_images']:,} test images."
    )


def _describe_size(facts: CardFacts) -> str:
    return f"{facts.image_size} x {facts.image_size}"


def _describe_use(facts: CardFacts) -> str:
    side = facts.image_size
    views = {
        "one": "There is no test-time augmentation.",
        "mirror": "Test-time augmentation: the probabilities of the image and its mirror image are averaged.",
        "six": "Test-time augmentation: six views are averaged where the top-1 margin is below 0.4.",
    }[facts.views]
    lines = [
        f"`{MODEL}` takes `images`, uint8 [N, {side}, {side}, 3], RGB, any N, and gives `probabilities`, "
        "float32 [N, C], in the order of the classes below. Scaling and softmax are inside. "
        f"{views} Operators: ONNX opset {facts.opset}.",
        _FITS[facts.record["execution"].get("fit", "squeeze")].format(size=_describe_size(facts)),
        "```python\n"
        "import numpy as np\n"
        "import onnxruntime\n\n"
        f'session = onnxruntime.InferenceSession("{MODEL}")\n'
        f"images = np.zeros((1, {side}, {side}, 3), np.uint8)\n"
        '(probabilities,) = session.run(None, {"images": images})\n'
        "```",
        "Classes: " + ", ".join(_escape(name) for name in facts.record["data"]["classes"]) + ".",
    ]
    int8 = facts.parity["int8"]
    if int8["published"]:
        accuracy, speed = int8["accuracy"], int8["images_per_second"]
        lines.append(
            f"`{INT8_MODEL}` is the same in 8 bits: {_percent(accuracy['int8'])} instead of "
            f"{_percent(accuracy['fp32'])}, at {speed['int8'] / speed['fp32']:.1f} times the speed "
            f"({speed['int8']:,.0f} images/s where this was published, in batches of {int8['batch_size']})."
        )
    else:
        lines.append(f"There is no `{INT8_MODEL}`: {int8['verdict']}.")
    return "\n\n".join(lines)


def _describe_data(facts: CardFacts) -> str:
    data = facts.record["data"]
    aside = f", {data['num_validation']:,} were set aside to validate" if data["num_validation"] else ""
    return (
        f"{_escape(data['name'])}: {data['num_train']:,} images to train on{aside}, {data['num_test']:,} to test on. "
        f"The sha256 over classes, images and labels is `{data['digest']}`."
    )


def _describe_training(facts: CardFacts) -> str:
    record = facts.record
    settings = "\n".join(f"| `{name}` | {value} |" for name, value in record["settings"].items())
    recipe = f"Recipe `{record['recipe']}`, started" if record["recipe"] else "Started"
    pretrained = record["pretrained"]
    start = ""
    if pretrained:
        start = f"It started from weights of the sha256 `{pretrained['digest']}`: {_escape(describe_head(record))}."
    machine = ", ".join(f"{key} {value}" for key, value in record["machine"]["class"].items() if value)
    return f"{recipe} {record['started_at']}, on {machine}. {start}\n\n" f"| setting | value |\n|---|---|\n{settings}"


def _describe_results(facts: CardFacts) -> str:
    metrics, n = facts.metrics, facts.metrics["num_images"]

    def describe(name: str) -> str:
        return f"{_percent(metrics[name])} | {' to '.join(_interval(metrics[name], n))} |"

    has_top5 = len(metrics["per_class"]) >= MIN_TOP5_CLASSES
    rows = [
        f"| accuracy | {describe('accuracy')}",
        *([f"| top-5 accuracy | {describe('top5_accuracy')}"] if has_top5 else []),
        f"| macro F1 | {metrics['macro']['f1']:.4f} | |",
        f"| cross entropy | {metrics['loss']:.4f} | |",
        f"| expected calibration error | {_percent(metrics['expected_calibration_error'])} | |",
    ]
    classes = [
        f"| {_escape(name)} | {_percent(scores['accuracy'])} "
        f"| {' to '.join(_interval(scores['accuracy'], scores['support']))} "
        f"| {_percent(scores['precision'])} | {scores['support']:,} |"
        for name, scores in metrics["per_class"].items()
    ]
    return (
        "Of the published model's own answers on the whole test set, which was looked at once, after the training; "
        "intervals are Wilson's, at 95 %.\n\n"
        "| metric | value | interval |\n|---|---|---|\n" + "\n".join(rows) + "\n\n"
        "| class | accuracy | interval | precision | images |\n|---|---|---|---|---|\n" + "\n".join(classes)
    )


def _describe_weaknesses(facts: CardFacts) -> str:
    classes = list(facts.metrics["per_class"])
    confusion = np.array(facts.metrics["confusion_matrix"])
    wrong = confusion - np.diag(confusion.diagonal())
    support = confusion.sum(axis=1)
    order = np.argsort(-wrong, axis=None, kind="stable")[:NUM_WEAKNESSES]
    pairs = [divmod(int(index), len(classes)) for index in order]
    lines = [
        f"- {_escape(classes[true])} predicted as {_escape(classes[given])}: {wrong[true, given]} of "
        f"{support[true]:,} images ({_percent(wrong[true, given] / support[true])})."
        for true, given in pairs
        if wrong[true, given]
    ]
    return "The most frequent confusions:\n\n" + "\n".join(lines) if lines else "No test image is misclassified."


_FITS = {
    "squeeze": "As in the training, resize other images to {size} pixels with antialiasing, whatever their ratio.",
    "crop": "As in the training, crop other images to the central square, and resize it to {size} pixels with "
    "antialiasing.",
    "pad": "As in the training, resize other images into {size} pixels with antialiasing, and pad them with black.",
    "refuse": "The training took no images of other sizes.",
}
_LIMITS = (
    "It predicts one of its classes for every image, also for one that shows none of them. It takes images of {size} "
    "pixels; larger ones are scaled down and lose their detail. Its figures hold for images that were taken as those "
    "of its data were; other sources, and images changed on purpose, were not tested. It was not made to recognise "
    "people, nor for decisions about them."
)


def _describe_proof(facts: CardFacts) -> str:
    worst = max(line["largest_difference"] for line in facts.parity["fp32"])
    agreement = min(line["agreement"] for line in facts.parity["fp32"])
    sizes = ", ".join(str(line["batch_size"]) for line in facts.parity["fp32"])
    commit = facts.record["code"]["commit"]
    plugins = (facts.record.get("plugins") or {}).values()
    others = "".join(f"| code of `{each['target']}` | `{each['digest']}` |\n" for each in plugins)
    return (
        f"On all {facts.metrics['num_images']:,} test images, in batches of {sizes}, no probability is further from "
        f"the trainer's than {worst:.1e}, and {_percent(agreement)} of the classes are the same (`{PARITY}`).\n\n"
        f"| what | digest |\n|---|---|\n"
        f"| weights | `{facts.weights_digest}` |\n"
        f"| data | `{facts.record['data']['digest']}` |\n"
        f"| code | `{facts.record['code']['digest']}`{f', commit `{commit}`' if commit else ''} |\n{others}"
        f"| environment | `{facts.record['environment']['digest']}` |\n\n"
        f"`{SIGNATURE}`, where it lies beside this card, is a signature over all files by OpenSSF's model-signing. To "
        "check every file, and who signed it:\n\n"
        "```bash\nimage_classifier registry check FOLDER --public_key KEY\n```\n\n"
        f"To train the run again and compare every bit, on {describe_checkers(facts.record)}:\n\n"
        "```bash\nimage_classifier verify RUN\n```"
    )


def _percent(rate: float | None) -> str:
    return "-" if rate is None else f"{100 * rate:.2f} %"


def _interval(rate: float | None, num_images: int) -> tuple[str, ...]:
    if rate is None or not num_images:
        return ("-",)
    return tuple(_percent(bound) for bound in compute_wilson_interval(rate * num_images, num_images))


def _escape(text: str) -> str:
    """Escape what Markdown or a terminal would take for more than text: names come from data that others made."""
    return "".join(f"\\{character}" if character in "\\`*_[]<>|#" else character for character in make_printable(text))
