"""A run as a whole: what it leaves, that it is true, and what it refuses before it writes anything."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from image_classifier.data.dataset import load_snapshot
from image_classifier.errors import DataError, ImageClassifierError, Interrupted, ModelError, RunError, SettingsError
from image_classifier.experiment import RunResult, run
from image_classifier.reporter import Reporter
from image_classifier.settings import RunSettings
from image_classifier.tracking.checking import check_finished, verify_files
from image_classifier.tracking.checkpoint import Checkpoints, load_model
from image_classifier.tracking.identity import compute_weights_digest
from image_classifier.tracking.reading import read_chain, read_epochs, read_manifest, read_predictions, read_record
from image_classifier.training.evaluate import compute_probabilities
from image_classifier.training.loop import Step
from image_classifier.verification import VerificationSettings, verify
from tests.tiny import make_settings, write_tiny_dataset


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_dataset(tmp_path_factory.mktemp("data") / "tiny")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, dataset: Path) -> RunResult:
    return run(make_settings(tmp_path_factory.mktemp("experiments"), dataset), command=["trainer", "--x"])


def test_a_run_leaves_every_file_of_a_run_and_a_manifest_over_them(finished: RunResult) -> None:
    names = {path.name for path in finished.folder.iterdir()}
    files = "environment.json run.json metrics.jsonl digests.jsonl model.pth metrics.png evaluation.json"
    assert names == {*files.split(), "predictions.npz", "manifest.json", "checkpoints"}
    check_finished(finished.folder)
    assert verify_files(finished.folder) == ()
    assert read_manifest(finished.folder)["weights_digest"] == finished.weights_digest


def test_the_accuracy_is_that_of_the_predictions_counted_by_hand(finished: RunResult) -> None:
    probabilities, labels = read_predictions(finished.folder)
    assert probabilities.shape == (60, 10) and probabilities.dtype == np.float32 and labels.dtype == np.int64
    hits = sum(int(row.argmax() == label) for row, label in zip(probabilities, labels, strict=True))
    assert finished.evaluation["accuracy"] == pytest.approx(hits / 60, abs=1e-7)
    assert json.loads((finished.folder / "evaluation.json").read_text()) == finished.evaluation


def test_model_pth_alone_gives_the_predictions_again(finished: RunResult, dataset: Path) -> None:
    model = load_model(finished.folder / "model.pth")
    images, _ = load_snapshot(dataset).test
    with torch.inference_mode():
        probabilities = model.classifier(torch.from_numpy(np.array(images))).softmax(dim=1).numpy()
    assert np.array_equal(probabilities, read_predictions(finished.folder)[0])
    assert model.classes == load_snapshot(dataset).classes
    assert compute_weights_digest(model.classifier) == finished.weights_digest


def test_the_record_says_what_it_is_a_run_of(finished: RunResult, dataset: Path) -> None:
    record = read_record(finished.folder)
    assert record["command"] == ["trainer", "--x"]
    assert record["data"]["digest"] == load_snapshot(dataset).digest and record["data"]["name"] == "sample"
    assert (record["data"]["num_train"], record["data"]["num_validation"], record["data"]["num_test"]) == (200, 0, 60)
    assert "auto" not in record["settings"].values() and record["settings"]["shards"] == 1


def test_metrics_have_a_line_an_epoch_and_the_chain_a_line_every_ten_steps(finished: RunResult) -> None:
    epochs = read_epochs(finished.folder)
    assert [(line["epoch"], line["step"]) for line in epochs] == [(1, 20), (2, 40)]
    for line in epochs:
        assert 0 <= line["train_accuracy"] <= 1 and line["images_per_second"] > 0
        assert np.mean(line["loss_by_part"]) == pytest.approx(line["train_loss"])
    assert [line["step"] for line in read_chain(finished.folder)] == [10, 20, 30, 40]


def test_two_runs_end_with_the_same_bits_and_another_seed_with_others(
    finished: RunResult, dataset: Path, tmp_path: Path
) -> None:
    same = run(make_settings(tmp_path, dataset, "same", num_workers=2))
    assert same.weights_digest == finished.weights_digest
    assert read_chain(same.folder) == read_chain(finished.folder)
    assert run(make_settings(tmp_path, dataset, "other", seed=1)).weights_digest != finished.weights_digest


def test_no_random_number_comes_from_the_global_generators(dataset: Path, tmp_path: Path) -> None:
    torch_state, numpy_state = torch.random.get_rng_state(), np.random.get_state()
    run(make_settings(tmp_path, dataset, num_epochs=1, model="resnet"))
    assert torch.equal(torch.random.get_rng_state(), torch_state)
    assert all(np.array_equal(one, two) for one, two in zip(np.random.get_state(), numpy_state, strict=True))


@pytest.mark.parametrize("batch_size", [1, 7, 60, 200])
def test_the_batch_size_does_not_change_an_evaluation(batch_size: int, dataset: Path, tmp_path: Path) -> None:
    one = run(make_settings(tmp_path, dataset, "a", num_epochs=0))
    other = run(make_settings(tmp_path, dataset, "b", num_epochs=0, batch_size=batch_size))
    assert one.evaluation == other.evaluation


def test_zero_epochs_evaluate_a_pretrained_model_as_it_is(finished: RunResult, dataset: Path, tmp_path: Path) -> None:
    settings = make_settings(tmp_path, dataset, num_epochs=0, pretrained_model=finished.folder / "model.pth")
    result = run(settings)
    assert result.weights_digest == finished.weights_digest and result.evaluation == finished.evaluation
    assert read_epochs(result.folder) == []
    assert (
        read_record(result.folder)["pretrained"]["digest"]
        == read_manifest(finished.folder)["files"]["model.pth"]["sha256"]
    )


def test_training_goes_on_from_a_pretrained_model_below_the_experiments_folder(
    finished: RunResult, dataset: Path
) -> None:
    experiments = finished.folder.parents[1]
    result = run(make_settings(experiments, dataset, "on", pretrained_model=Path("tiny/run/model.pth")))
    assert result.weights_digest != finished.weights_digest
    first, second = read_epochs(finished.folder)[0], read_epochs(result.folder)[0]
    assert second["train_loss"] < first["train_loss"]


def test_the_best_weights_on_the_validation_part_are_kept(dataset: Path, tmp_path: Path) -> None:
    values: dict[str, Any] = {"num_epochs": 6, "validation_fraction": 0.25, "learning_rate": 0.02}
    settings = make_settings(tmp_path, dataset, keep="best", keep_checkpoints=6, **values)
    result = run(settings)
    epochs = read_epochs(result.folder)
    accuracies = [line["validation_accuracy"] for line in epochs]
    best = accuracies.index(max(accuracies))
    state = Checkpoints(result.folder / "checkpoints").load(epochs[best]["step"])["classifier"]
    weights = load_model(result.folder / "model.pth").classifier.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in weights.items())
    record = read_record(result.folder)["data"]
    assert (record["num_train"], record["num_validation"]) == (150, 50)


@pytest.fixture(scope="module")
def split_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set with a validation part: 40 images to train with, 20 to validate with, 20 to test with."""
    folder = tmp_path_factory.mktemp("data") / "split"
    generator = np.random.default_rng(0)
    for part, count in (("train", 20), ("val", 10), ("test", 10)):
        for name, level in (("dark", 0), ("light", 128)):
            (folder / part / name).mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(level, level + 128, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / part / name / f"{number}.png")
    return folder


def test_the_validation_part_of_the_data_is_validated_on_and_never_trained_on(
    split_dataset: Path, tmp_path: Path
) -> None:
    result = run(make_settings(tmp_path, split_dataset, keep="best", num_epochs=4))
    record, epochs = read_record(result.folder)["data"], read_epochs(result.folder)
    assert (record["num_train"], record["num_validation"], record["num_test"]) == (40, 20, 20)
    assert {line["validation_accuracy"] * 20 % 1 for line in epochs} == {0.0}
    assert len({line["validation_loss"] for line in epochs}) == 4
    without = tmp_path / "without"
    shutil.copytree(split_dataset, without)
    shutil.rmtree(without / "val")
    again = run(make_settings(tmp_path / "again", without, num_epochs=4))
    assert [line["train_loss"] for line in epochs] == [line["train_loss"] for line in read_epochs(again.folder)]
    assert verify(VerificationSettings(run_folder=result.folder)).verdict == "IDENTICAL"


def test_the_record_says_what_was_found_in_the_data_and_the_model_fits_as_it_was_trained(
    split_dataset: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "data"
    shutil.copytree(split_dataset, folder)
    shutil.rmtree(folder / "test" / "light")
    (folder / "train" / "dark" / "bad.png").write_bytes(b"no image")
    Image.new("RGB", (64, 32)).save(folder / "train" / "dark" / "wide.png")
    result = run(make_settings(tmp_path, folder, fit="crop", skip_bad=True, keep="best"))
    record = read_record(result.folder)
    assert (record["execution"]["fit"], record["execution"]["skip_bad"]) == ("crop", True)
    findings = record["data"]["findings"]
    assert findings["sizes"] == {"64 x 32": 1} and len(findings["left_out"]) == 1
    resized, left_out, untested = record["data"]["notes"]
    assert resized.startswith("note: 1 image was resized to 32 x 32, from 64 x 32; up to 50% of one was cut off")
    assert left_out == f"note: 1 image was left out because it could not be read: {findings['left_out'][0]}"
    assert untested == "warning: no test image: light"
    assert load_model(result.folder / "model.pth").fit == "crop"
    assert verify(VerificationSettings(run_folder=result.folder)).verdict == "IDENTICAL"
    expect_refusal(make_settings(tmp_path, folder, run_name="other"), DataError, "1 of the images cannot be read")


def test_settings_that_do_not_go_with_the_parts_of_the_data_are_refused(
    dataset: Path, split_dataset: Path, tmp_path: Path
) -> None:
    settings = make_settings(tmp_path, split_dataset, validation_fraction=0.5)
    expect_refusal(
        settings, SettingsError, "--validation_fraction 0.5 sets images aside, but split has a validation part"
    )
    settings = make_settings(tmp_path, dataset, keep="best")
    expect_refusal(
        settings, SettingsError, "--keep best needs images on which to judge .* a --validation_fraction above"
    )
    settings = make_settings(tmp_path, dataset, early_stopping=2, num_epochs=9)
    expect_refusal(settings, SettingsError, "--early_stopping 2 needs images on which to judge what is best")


def test_a_run_that_diverges_is_stopped_with_the_remedy(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="diverged in epoch 1.*lower --learning_rate"):
        run(make_settings(tmp_path, dataset, learning_rate=1e30))


def test_an_interrupted_run_goes_on_and_ends_with_the_same_bits(
    finished: RunResult, dataset: Path, tmp_path: Path
) -> None:
    steps: list[int] = []

    class Counter(Reporter):
        def step(self, step: Step) -> None:
            steps.append(step.number)

    def has_reached(number: int) -> bool:
        return steps[-1] == number

    for stop_at in (1, 7, 20, 33):
        with pytest.raises(Interrupted, match=f"stopped after step {stop_at} of 40; --resume continues"):
            settings = make_settings(tmp_path, dataset, resume=stop_at > 1)
            run(settings, reporter=Counter(), should_stop=partial(has_reached, stop_at))
    result = run(make_settings(tmp_path, dataset, resume=True), reporter=Counter())
    assert steps == list(range(1, 41))
    assert result.weights_digest == finished.weights_digest and result.evaluation == finished.evaluation
    assert read_chain(result.folder) == read_chain(finished.folder)
    timing = {"seconds", "images_per_second"}
    for one, other in zip(read_epochs(result.folder), read_epochs(finished.folder), strict=True):
        assert {key: one[key] for key in one.keys() - timing} == {key: other[key] for key in other.keys() - timing}


def test_growing_images_and_muon_go_on_with_the_same_bits_and_the_model_knows_its_size(
    dataset: Path, tmp_path: Path
) -> None:
    """Interrupted at the last step of small images and at the first of larger ones."""
    values: dict[str, Any] = {
        "model": "airbench_small",
        "optimizer": "muon",
        "nesterov": True,
        "image_sizes": (16, 20),
        "batch_size": 50,
        "learning_rate": 0.2,
        "momentum": 0.6,
        "weight_decay": 1e-3,
        "digest_every": 1,
        "views": "six",
    }
    whole = run(make_settings(tmp_path / "whole", dataset, **values))
    for number, num_steps in enumerate((4, 1)):
        settings = make_settings(tmp_path / "parts", dataset, resume=number > 0, **values)
        with pytest.raises(Interrupted):
            run(settings, should_stop=iter([False] * (num_steps - 1) + [True]).__next__)
    result = run(make_settings(tmp_path / "parts", dataset, resume=True, **values))
    assert read_chain(result.folder) == read_chain(whole.folder)
    assert result.weights_digest == whole.weights_digest and result.evaluation == whole.evaluation
    assert whole.evaluation["views"] == "six"

    model = load_model(whole.folder / "model.pth")
    assert model.classifier.image_size == 20
    images, _ = load_snapshot(dataset).test
    probabilities = compute_probabilities(model.classifier, images, views=model.views)
    assert np.array_equal(probabilities, read_predictions(whole.folder)[0])


def test_a_profile_is_added_and_changes_no_bit(finished: RunResult, dataset: Path, tmp_path: Path) -> None:
    result = run(make_settings(tmp_path, dataset, profile=True))
    assert {path.name for path in (result.folder / "profile").iterdir()} == {"operators.txt", "trace.json"}
    assert read_chain(result.folder) == read_chain(finished.folder)
    assert verify_files(result.folder) == () and "profile/trace.json" not in read_manifest(result.folder)["files"]


def test_a_profile_takes_the_place_of_an_earlier_one(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        run(make_settings(tmp_path, dataset, profile=True), should_stop=iter([False] * 15 + [True]).__next__)
    settings = make_settings(tmp_path, dataset, profile=True, resume=True)
    first = (settings.run_folder / "profile" / "trace.json").read_bytes()
    result = run(settings)
    assert (result.folder / "profile" / "trace.json").read_bytes() != first
    assert verify_files(result.folder) == ()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"learning_rate": 0.02}, "settings changed: --learning_rate was 0.01, is 0.02"),
        ({"dataset_folder": "other"}, "data changed"),
    ],
)
def test_a_run_is_not_resumed_as_another(values: dict[str, Any], words: str, dataset: Path, tmp_path: Path) -> None:
    if "dataset_folder" in values:
        values = {"dataset": write_tiny_dataset(tmp_path / "other", seed=1)}
    with pytest.raises(Interrupted):
        run(make_settings(tmp_path, dataset), should_stop=lambda: True)
    with pytest.raises(RunError, match=words):
        run(make_settings(tmp_path, **{"dataset": dataset, "resume": True, **values}))


@pytest.mark.parametrize(
    ("part", "change", "option"),
    [
        ("code", {"digest": "0" * 64}, "allow_code_change"),
        ("environment", {"digest": "0" * 64, "distributions": {"torch": "1.0"}}, "allow_environment_change"),
        ("machine", {"digest": "0" * 64, "class": {"processor": "z80"}}, "allow_other_machine"),
    ],
)
def test_what_may_change_must_be_allowed_and_is_recorded(
    part: str, change: dict[str, Any], option: str, dataset: Path, tmp_path: Path
) -> None:
    with pytest.raises(Interrupted):
        run(make_settings(tmp_path, dataset), should_stop=lambda: True)
    path = tmp_path / "tiny" / "run" / "run.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, part: {**record[part], **change}}))
    if part == "machine":
        checkpoints = Checkpoints(path.parent / "checkpoints")
        state = checkpoints.load(1)
        checkpoints.save(2, {**state, "machine_digest": "0" * 64}, keep=1)
        # step 2's name with step 1's content: what counts is whose machine wrote it
    with pytest.raises(RunError, match=f"its {part} changed: .*--{option}"):
        run(make_settings(tmp_path, dataset, resume=True))
    allowed: dict[str, Any] = {option: True}
    result = run(make_settings(tmp_path, dataset, resume=True, **allowed))
    changes = read_record(result.folder)["changes"]
    assert len(changes) == 1 and part in changes[0]
    breaks = [line for line in read_chain(result.folder) if "break" in line]
    assert len(breaks) == (1 if part == "machine" else 0)


def expect_refusal(settings: RunSettings, error: type[ImageClassifierError], words: str) -> None:
    """A refusal is one line, and nothing was written."""
    before = sorted(settings.experiments_folder.rglob("*"))
    with pytest.raises(error, match=words) as caught:
        run(settings)
    assert "\n" not in str(caught.value)
    assert sorted(settings.experiments_folder.rglob("*")) == before


def test_a_run_folder_that_exists_is_left_alone(dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "tiny" / "run").mkdir(parents=True)
    expect_refusal(make_settings(tmp_path, dataset), RunError, "exists already; choose another --run_name")


def test_a_missing_data_set_is_refused(tmp_path: Path) -> None:
    expect_refusal(make_settings(tmp_path / "e", tmp_path / "none"), DataError, "none")


def test_a_batch_larger_than_the_training_set_is_refused(dataset: Path, tmp_path: Path) -> None:
    settings = make_settings(tmp_path, dataset, batch_size=201)
    expect_refusal(settings, SettingsError, "--batch_size takes at most the 200 images.*got: 201")


def test_resuming_what_was_never_begun_is_refused(dataset: Path, tmp_path: Path) -> None:
    expect_refusal(make_settings(tmp_path, dataset, resume=True), RunError, "there is no run .* to resume")


class Hostile:
    """Pickled, it would create a file when loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def test_a_pretrained_model_that_is_none_is_refused(finished: RunResult, dataset: Path, tmp_path: Path) -> None:
    def refuse(content: bytes | None, words: str, **values: Any) -> None:
        path = tmp_path / "pretrained.pth"
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(content)
        settings = make_settings(tmp_path / "e", dataset, pretrained_model=path, **values)
        expect_refusal(settings, ModelError, words)

    good = (finished.folder / "model.pth").read_bytes()
    refuse(None, "pretrained.pth")
    refuse(b"", "not a model file, or is damaged")
    refuse(b"rubbish", "not a model file, or is damaged")
    refuse(good[: len(good) // 2], "not a model file, or is damaged")
    refuse(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "Git LFS pointer.*git lfs pull")
    refuse(pickle.dumps(Hostile(tmp_path / "pwned")), "not a model file, or is damaged")
    assert not (tmp_path / "pwned").exists()
    refuse(good, "has the network lenet, not resnet; choose --model lenet", model="resnet")
    refuse(good, r"was trained with --input_mean \[0.5, 0.5, 0.5\]", input_mean=(0.4, 0.5, 0.5))


class Notes(Reporter):
    """Keeps what is noted."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def note(self, text: str) -> None:
        self.texts.append(text)


def save_with_classes(source: Path, target: Path, classes: Sequence[str]) -> Path:
    """Save a model file again as one that was trained on classes of these names."""
    content = torch.load(source, weights_only=True)
    torch.save({**content, "classes": list(classes)}, target)
    return target


def test_classes_that_were_renamed_are_not_evaluated_with_a_head_that_nobody_trained(
    finished: RunResult, dataset: Path, tmp_path: Path
) -> None:
    classes = load_snapshot(dataset).classes
    for number, names in enumerate(([f"other {name}" for name in classes], [*classes[:-1], "\x1b[31mx"])):
        path = save_with_classes(finished.folder / "model.pth", tmp_path / f"{number}.pth", names)
        settings = make_settings(tmp_path / "e", dataset, num_epochs=0, pretrained_model=path)
        expect_refusal(settings, ModelError, "--num_epochs 0 evaluates, but .* has no class of the name of each of the")


def test_images_sizes_that_no_step_has_are_noted(dataset: Path, tmp_path: Path) -> None:
    notes = Notes()
    sizes: dict[str, Any] = {"model": "resnet", "image_sizes": (16, 20, 24, 28, 32), "batch_size": 100, "num_epochs": 1}
    run(make_settings(tmp_path, dataset, **sizes), reporter=notes)
    assert notes.texts == [
        "the run has 2 steps, fewer than --image_sizes has sizes: it trains at 16,24, and evaluates at 32"
    ]


def test_a_validation_part_of_no_image_is_refused(dataset: Path, tmp_path: Path) -> None:
    for fraction in (0.001, 0.999):
        settings = make_settings(tmp_path, dataset, validation_fraction=fraction, num_epochs=0)
        expect_refusal(settings, SettingsError, f"--validation_fraction takes 0, or a part of the 200 .*{fraction}$")


def test_a_pretrained_model_with_other_classes_says_which_tensor_differs(finished: RunResult, tmp_path: Path) -> None:
    content = torch.load(finished.folder / "model.pth", weights_only=True)
    content["classes"] = content["classes"][:7]
    torch.save(content, tmp_path / "seven.pth")
    with pytest.raises(ModelError, match=r"network.fc3.bias .*\[10\].*\[7\]"):
        load_model(tmp_path / "seven.pth")
