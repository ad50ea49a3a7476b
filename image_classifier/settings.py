"""Every setting of a run: frozen, complete, and checked when made. Free of torch.

`TrainingSettings` are those that decide the weights: with the data, the code, the environment and the machine
class they are a run's identity. `RunSettings` say where things lie and how the work is carried out.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_args

from image_classifier.access import DATABASE_FOLDER, DATASET_FOLDER, DatabaseAccess, Reading
from image_classifier.choices import (
    CHOICES,
    ClassWeights,
    Device,
    Engine,
    Fit,
    Flip,
    Freeze,
    InstructionSet,
    Keep,
    Log,
    NumKept,
    Precision,
    Sampler,
    Schedule,
    Views,
)
from image_classifier.credentials import Secret, resolve_password
from image_classifier.errors import SettingsError
from image_classifier.image_sizes import DEFAULT_IMAGE_SIZE, ImageSize, check_image_size
from image_classifier.plugins import NETWORKS, SCALES, check_name, is_own, takes_image_size
from image_classifier.recipe import freeze_lists, load_recipe
from image_classifier.references import (
    DATABASE_PREFIX,
    check_tracking_uri,
    get_published_weights,
    get_reference,
    get_url,
    parse_reference,
)
from image_classifier.text import quote_unprintable

IMAGES_PER_SHARD, MOST_SHARDS = 125, 8
"""Of a batch whose shards are not given."""

_NAME = re.compile(r"[^\s/\\\x00-\x1f\x7f-\x9f.][^/\\\x00-\x1f\x7f-\x9f]{0,99}")
_INTERVAL = re.compile(r"([1-9][0-9]{0,8})(epochs|steps)")

_FAST = freeze_lists(load_recipe("fast"))
"""What a setting is where neither a recipe nor anything else says it."""


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """What decides the weights.

    Attributes:
        model: Network of this package, or your own: my_package.nets:build, or a name that a package registers.
        num_epochs: Number of passes over the training set; 0 only evaluates.
        batch_size: Images per step.
        shards: Parts of a batch; one thread computes each, with batch norm over its images only. 0 takes one part
            per 125 images, up to 8. A batch has no more parts than images.
        image_size: Height and width in pixels of the model's input. All images are resized to it. It is part
            of the data's digest.
        image_sizes: Image sizes in pixels for progressive resizing: each is used for an equal part of the run.
            With fewer steps than sizes, some are skipped. Evaluation uses the last one. The
            recipes list them for images of 32 pixels; they scale with --image_size unless given.
        optimizer: sgd, or muon, which orthogonalizes the updates of convolution filters; or your own.
        learning_rate: Peak learning rate of the schedule; with muon, that of the filters.
        body_learning_rate: Peak learning rate of all layers but the head, with sgd; default: learning_rate.
        freeze: body trains only the head, with sgd; all other layers, including batch norm, keep the weights of
            --pretrained_model.
        momentum: Momentum, from 0 up to but not including 1; with muon, that of the filters.
        nesterov: Nesterov momentum, which muon always uses.
        weight_decay: L2 penalty of sgd for weights with two or more dimensions. With muon, decoupled weight decay of
            the head and the biases.
        schedule: constant, or triangular: a linear rise to learning_rate, then a linear fall to 0.
        warmup_fraction: Fraction of all steps for the rise of a triangular schedule; 0 with the constant one.
        label_smoothing: Fraction of the target that is spread over all classes.
        flip: Horizontal flips: none, random for each image and epoch, or random in the first epoch and alternating
            from there on.
        translate: Maximum random translation in pixels, with reflection at the edge; up to half of image_size.
        cutout: Size in pixels of the grey square that covers a part of each image, up to image_size; 0 for none.
        color_jitter: Brightness, contrast and saturation of each image are multiplied by random numbers from 1 - this
            to 1 + this; 0 for none.
        rand_augment: Magnitude of RandAugment, 1 to 30: each image gets two random operations out of fourteen; 0
            for none.
        mixup: Alpha of mixup: each image of a batch is mixed with another, with a ratio from Beta(alpha, alpha); 0
            for none.
        cutmix: Alpha of cutmix: a rectangle of each image is replaced by that of another; the remaining area comes from
            Beta(alpha, alpha); 0 for none.
        sampler: Images of an epoch: each once, or balanced, the same number per class; small classes are repeated.
        shuffle_window: Size in MiB of the shuffle window, for snapshots larger than memory. Blocks of
            1 MiB come in a random order, and the images of a window are shuffled. 0 shuffles all images of an epoch.
        class_weights: Weight of an image in the loss: none, or balanced, by the inverse frequency of its class.
        views: Test-time augmentation: none, mirror, or six views when the top-1 margin is below 0.4.
            Affects only the evaluation.
        input_mean: Mean of the red, green and blue inputs, in [0, 1]; it is subtracted.
        input_std: Standard deviation of the red, green and blue inputs; they are divided by it.
        validation_fraction: Fraction of the training set that is held out for validation, by the seed; for data
            without a validation split.
        keep: Weights that become model.pth: the last, or those with the best validation accuracy.
        ema_decay: Decay of an exponential moving average of the weights. The average is validated,
            tested and saved; 0 for none.
        early_stopping: Epochs without a better validation accuracy after which the run ends; 0 for none.
        seed: Seed of initialisation, shuffling and augmentation.
        device: Device for the training; auto uses a GPU if there is one.
        precision: Floating-point type of the training; auto uses bf16 if the processor supports it.
        engine: eager (torch), or compiled, with the package's kernels where they are faster; auto is compiled on a CPU;
            changes weights only by rounding.
        instruction_set: native for all of the processor's vector instructions, or the highest ones to use. With
            portable, only the package's kernels compute, with the same bits on every processor. Changes weights only by
            rounding.
        digest_every: Steps between two digests of the training state; changes no weights.
    """

    model: str = _FAST["model"]
    num_epochs: int = _FAST["num_epochs"]
    batch_size: int = _FAST["batch_size"]
    shards: int = _FAST["shards"]
    image_size: ImageSize = DEFAULT_IMAGE_SIZE
    image_sizes: tuple[int, ...] = _FAST["image_sizes"]
    optimizer: str = _FAST["optimizer"]
    learning_rate: float = _FAST["learning_rate"]
    body_learning_rate: float | None = None
    freeze: Freeze = "none"
    momentum: float = _FAST["momentum"]
    nesterov: bool = _FAST["nesterov"]
    weight_decay: float = _FAST["weight_decay"]
    schedule: Schedule = _FAST["schedule"]
    warmup_fraction: float = _FAST["warmup_fraction"]
    label_smoothing: float = _FAST["label_smoothing"]
    flip: Flip = _FAST["flip"]
    translate: int = _FAST["translate"]
    cutout: int = _FAST["cutout"]
    color_jitter: float = 0.0
    rand_augment: int = 0
    mixup: float = 0.0
    cutmix: float = 0.0
    sampler: Sampler = "uniform"
    shuffle_window: int = 0
    class_weights: ClassWeights = "none"
    views: Views = _FAST["views"]
    input_mean: tuple[float, float, float] = _FAST["input_mean"]
    input_std: tuple[float, float, float] = _FAST["input_std"]
    validation_fraction: float = 0.0
    keep: Keep = "last"
    ema_decay: float = 0.0
    early_stopping: int = 0
    seed: int = 0
    device: Device = "auto"
    precision: Precision = _FAST["precision"]
    engine: Engine = "auto"
    instruction_set: InstructionSet = "native"
    digest_every: int = _FAST["digest_every"]

    @property
    def has_targets(self) -> bool:
        """Whether images are trained towards more than their class, smoothed: a mixture of classes, or a weight."""
        return bool(self.mixup or self.cutmix) or self.class_weights == "balanced"

    def count_shards(self) -> int:
        """Count the shards of a whole batch."""
        shards = self.shards or min(max(self.batch_size // IMAGES_PER_SHARD, 1), MOST_SHARDS)
        return min(shards, self.batch_size)

    @classmethod
    def from_recipe(cls, name: str, **changes: Any) -> TrainingSettings:
        """Make the settings of a recipe, some of them changed."""
        return cls(**{**freeze_lists(load_recipe(name, changes.get("image_size"))), **changes})

    def __post_init__(self) -> None:
        check_name("model", self.model)
        check_name("optimizer", self.optimizer)
        _check_choices(self)
        _check_additions(self)
        _check(self, "num_epochs", self.num_epochs >= 0, "a whole number of 0 or more")
        _check(self, "batch_size", self.batch_size >= 1, "a whole number of 1 or more")
        _check(self, "shards", 0 <= self.shards <= 1024, "a whole number from 0 to 1024")
        check_image_size(self.image_size)
        sizes_fit = bool(self.image_sizes) and all(size in SCALES for size in self.image_sizes)
        takes = f"whole numbers from {SCALES[0]} to {SCALES[-1]}, such as 16,24,32"
        _check(self, "image_sizes", sizes_fit, takes)
        _check(self, "learning_rate", 0 < self.learning_rate < float("inf"), "a number above 0")
        body_rate = self.body_learning_rate
        _check(self, "body_learning_rate", body_rate is None or 0 < body_rate < float("inf"), "a number above 0")
        _check(self, "momentum", 0 <= self.momentum < 1, "a number from 0 up to but not including 1")
        _check(self, "weight_decay", 0 <= self.weight_decay < float("inf"), "a number of 0 or more")
        _check(self, "warmup_fraction", 0 <= self.warmup_fraction < 1, "a number from 0 up to but not including 1")
        _check(self, "label_smoothing", 0 <= self.label_smoothing < 1, "a number from 0 up to but not including 1")
        for name, limit in (("translate", self.image_size // 2), ("cutout", self.image_size)):
            _check(self, name, 0 <= getattr(self, name) <= limit, f"a whole number from 0 to {limit}")
        _check(self, "input_mean", all(0 <= mean <= 1 for mean in self.input_mean), "three numbers from 0 to 1")
        _check(self, "input_std", all(0 < std <= 1 for std in self.input_std), "three numbers above 0, up to 1")
        _check(
            self, "validation_fraction", 0 <= self.validation_fraction < 1, "a number from 0 up to but not including 1"
        )
        _check(self, "seed", 0 <= self.seed < 2**63, "a whole number from 0 to 2**63 - 1")
        _check(self, "digest_every", self.digest_every >= 1, "a whole number of 1 or more")
        _check_combinations(self)
        _check_network(self)
        if self.instruction_set == "portable":
            object.__setattr__(self, "device", "cpu")


def _check_combinations(settings: TrainingSettings) -> None:
    """Check that settings go together which are each in range."""
    if settings.instruction_set == "portable":
        for name, others in (("precision", ["bf16"]), ("engine", ["eager"]), ("device", ["cuda"])):
            if getattr(settings, name) in others:
                raise SettingsError(
                    f"--instruction_set portable computes in single precision by kernels for the CPU, got: "
                    f"--{name} {getattr(settings, name)}; choose --{name} auto, or --instruction_set native"
                )
    if settings.optimizer == "sgd" and settings.nesterov and settings.momentum == 0:
        raise SettingsError("--nesterov needs a --momentum above 0; set --nesterov false, or a momentum")
    if settings.optimizer == "muon" and not settings.nesterov:
        raise SettingsError("--optimizer muon has Nesterov's momentum alone; set --nesterov true, or --optimizer sgd")
    if settings.optimizer == "muon" and settings.freeze == "body":
        raise SettingsError(
            "--freeze body takes --optimizer sgd, for muon's --learning_rate is that of the frozen filters; for "
            f"the head of an airbench network choose --optimizer sgd with --learning_rate {settings.batch_size / 2:g}, "
            "--momentum 0.85 and --weight_decay 0"
        )
    if settings.optimizer != "sgd" and settings.body_learning_rate is not None:
        raise SettingsError(
            "--body_learning_rate takes --optimizer sgd; with muon lower --learning_rate, which is the body's, for "
            "the head has a rate of its own"
        )
    if settings.freeze == "body" and settings.body_learning_rate is not None:
        raise SettingsError("--body_learning_rate is of a body that is trained; leave it out, or --freeze body")
    if settings.schedule == "constant" and settings.warmup_fraction != 0:
        raise SettingsError(
            "--warmup_fraction is of the triangular schedule, --schedule constant has none; "
            "set --warmup_fraction 0, or --schedule triangular"
        )


def _check_network(settings: TrainingSettings) -> None:
    """Check that a network goes with the optimizer and the image sizes; a plug-in is asked when it is built."""
    network = NETWORKS.get(settings.model)
    has_rates = settings.optimizer != "muon" or (network is not None and network.takes_muon)
    sizes_fit = all(takes_image_size(settings.model, size) for size in settings.image_sizes)
    if network is not None and network.needs and not (has_rates and sizes_fit):
        raise SettingsError(f"--model {settings.model} {network.needs}")
    if not has_rates:
        raise SettingsError(
            f"--optimizer muon has rates for the airbench networks; with --model {settings.model} choose "
            "--optimizer sgd and its --learning_rate and --momentum, such as 0.1 and 0.9"
        )
    if settings.instruction_set == "portable" and not is_own("optimizer", settings.optimizer):
        raise SettingsError(
            f"--instruction_set portable has kernels for the package's optimizers, got: --optimizer "
            f"{settings.optimizer}; choose sgd or muon, or --instruction_set native"
        )


ADDITIONS: dict[str, Any] = {
    **{"color_jitter": 0.0, "rand_augment": 0, "mixup": 0.0, "cutmix": 0.0, "ema_decay": 0.0, "early_stopping": 0},
    **{"sampler": "uniform", "class_weights": "none", "image_size": DEFAULT_IMAGE_SIZE},
    **{"body_learning_rate": None, "freeze": "none", "shuffle_window": 0},
}
"""Settings that a run does without, and what they are then; earlier versions had none of them."""


def _check_additions(settings: TrainingSettings) -> None:
    """Check what is done to images and weights on request alone."""
    _check(settings, "color_jitter", 0 <= settings.color_jitter <= 1, "a number from 0 to 1")
    _check(settings, "rand_augment", 0 <= settings.rand_augment <= 30, "a whole number from 0 to 30")
    for option in ("mixup", "cutmix"):
        alpha = getattr(settings, option)
        _check(settings, option, 0 <= alpha <= 100, "a number from 0 to 100")
        if alpha and settings.batch_size == 1:
            raise SettingsError(f"--{option} mixes the images of a batch; set --batch_size 2 or more, or --{option} 0")
    if settings.mixup and settings.cutmix:
        raise SettingsError("--mixup and --cutmix cannot be combined; set one of them to 0")
    if settings.class_weights == settings.sampler == "balanced":
        raise SettingsError(
            "--class_weights balanced and --sampler balanced make up for the same imbalance twice; choose one"
        )
    _check(settings, "shuffle_window", 0 <= settings.shuffle_window <= 2**20, "a whole number from 0 to 1,048,576")
    if settings.shuffle_window and settings.sampler != "uniform":
        raise SettingsError(
            "--shuffle_window reads blocks of a snapshot, each once an epoch, which --sampler balanced does not; "
            "set one of them alone"
        )
    _check(settings, "ema_decay", 0 <= settings.ema_decay < 1, "a number from 0 up to but not including 1")
    latest = max(settings.num_epochs - 2, 0)
    takes = f"a whole number from 0 to {latest}, for a run of {settings.num_epochs} epochs to end sooner"
    _check(settings, "early_stopping", 0 <= settings.early_stopping <= latest, takes)


def restore_training_settings(recorded: dict[str, Any]) -> TrainingSettings:
    """Make training settings again out of what a run's record holds.

    Raises:
        SettingsError: the record has a setting that this version does not know, or that is out of range.
    """
    unknown = recorded.keys() - TrainingSettings.__dataclass_fields__.keys() - {"num_threads", "deterministic"}
    if unknown:
        raise SettingsError(
            f"the record has settings of another version: {', '.join(map(quote_unprintable, sorted(unknown)))[:200]}; "
            "use the version that it names under code"
        )
    try:
        return TrainingSettings(**freeze_lists(update_recorded_settings(recorded)))
    except SettingsError as error:
        raise SettingsError(
            f"the record has a setting that this version does not take: {error}; "
            "use the version that it names under code"
        ) from error
    except TypeError as error:
        raise SettingsError(f"the record has a setting of a wrong type: {error}; restore run.json") from error


def update_recorded_settings(recorded: dict[str, Any]) -> dict[str, Any]:
    """Say in settings of now what a run did whose record holds these: some were added, others had no effect."""
    added = {"image_sizes": [DEFAULT_IMAGE_SIZE], "optimizer": "sgd", "shards": 1}
    settings = {**added, **ADDITIONS, **recorded}
    settings.pop("num_threads", None)  # how the work was carried out; its machine class has it
    if settings.pop("deterministic", True) is not True:
        raise SettingsError("--deterministic false is of versions before 0.2")
    if settings["optimizer"] == "muon":
        settings["nesterov"] = True
    if settings.get("schedule") == "constant":
        settings["warmup_fraction"] = 0.0
    return settings


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Where a run lies, what it reads, and how the work is carried out; none of it changes the weights.

    Attributes:
        experiments_folder: Folder of all experiments.
        experiment_name: Name of the experiment, a folder under experiments_folder (required).
        run_name: Name of the run, a folder under the experiment that must not exist yet (required).
        dataset_folder: Folder (or archive, Parquet file, or tars) with the data set, or its URL, such as
            s3://bucket/folder. With --database, the folder of the SQLite file and of the snapshots; default: data.
        fit: Images of other sizes are resized without keeping the aspect ratio (squeeze), cropped at the center
            (crop), padded in black (pad), or refused.
        database: Data set in the database to use instead: NAME for its newest version, or NAME@VERSION.
        db_config: YAML file with the connection settings of the database; default: a SQLite file in dataset_folder.
        db_pass_file: File with the password of the database, which may also be in DB_PASSWORD.
        pretrained_model: Pretrained weights: a model.pth, relative to experiments_folder, or any path; with --model,
            a state_dict as .pth or .safetensors; or torchvision:NETWORK@WEIGHTS, such as
            torchvision:resnet18@IMAGENET1K_V1. Network, input scaling and image size come from them unless given.
        num_threads: Threads that compute shards; 0 for one per available core.
        num_workers: Threads that prepare batches; 0 prepares them between the steps.
        checkpoint_every: Interval of checkpoints, such as 1epochs or 500steps.
        keep_checkpoints: Number of newest checkpoints to keep, or all, so that verify --sample can draw
            segments between them.
        tracking_uri: MLflow server or database to which settings, metrics and files are also logged.
        mirror: Folder, or URL such as s3://bucket/folder, to which the finished run is copied. --resume continues a run
            from there if it does not exist locally.
        log: Also writes the metrics of each epoch for TensorBoard, into the run folder's tensorboard/.
    """

    experiments_folder: Path = Path("experiments")
    experiment_name: str = ""
    run_name: str = ""
    dataset_folder: Path = DATASET_FOLDER
    fit: Fit = "squeeze"
    database: str | None = None
    db_config: Path | None = None
    db_pass_file: Path | None = None
    pretrained_model: Path | None = None
    num_threads: int = 0
    num_workers: int = 1
    checkpoint_every: str = "1epochs"
    keep_checkpoints: NumKept = 2
    tracking_uri: str | None = None
    mirror: Path | None = None
    log: Log = "none"
    resume: bool = False
    allow_code_change: bool = False
    allow_environment_change: bool = False
    allow_other_machine: bool = False
    mirror_checkpoints: bool = False
    profile: bool = False
    skip_bad: bool = False
    recipe: str | None = None
    recipe_reason: str | None = None
    settings_from_weights: tuple[str, ...] = ()
    training: TrainingSettings = field(default_factory=TrainingSettings)
    db_password: Secret | None = None
    ask_db_password: Callable[[], Secret] | None = None

    def __post_init__(self) -> None:
        for option in ("experiment_name", "run_name"):
            name = getattr(self, option)
            if not name:
                raise SettingsError(f"--{option} is required: a name for a folder")
            if not _NAME.fullmatch(name) or name != name.strip() or not _fits(name):
                raise SettingsError(
                    f"--{option} takes the name of a folder (no slash, no control character, no leading dot, "
                    f"at most 100 characters and 255 bytes), got: {name!r}"
                )
        _check(self, "fit", self.fit in get_args(Fit), "one of " + ", ".join(get_args(Fit)))
        _check(self, "log", self.log in get_args(Log), "one of " + ", ".join(get_args(Log)))
        in_database = get_reference(self.dataset_folder)
        if in_database is not None:
            object.__setattr__(self, "database", str(in_database))
        if self.database is not None:
            parse_reference(self.database)
            if in_database is not None or self.dataset_folder == DATASET_FOLDER:
                object.__setattr__(self, "dataset_folder", DATABASE_FOLDER)
        if get_url(self.dataset_folder) is not None and self.database is not None:
            raise SettingsError(
                "--dataset_folder with --database is the folder of SQLite's file and of snapshots, which must lie on "
                "this machine, got a URL"
            )
        if self.mirror_checkpoints and self.mirror is None:
            raise SettingsError("--mirror_checkpoints needs a --mirror to copy them to")
        _check(self, "num_threads", 0 <= self.num_threads <= 1024, "a whole number from 0 to 1024")
        _check(self, "num_workers", 0 <= self.num_workers <= 256, "a whole number from 0 to 256")
        _check(self, "keep_checkpoints", self.num_kept >= 1, "a whole number of 1 or more, or all")
        _check(
            self, "checkpoint_every", bool(_INTERVAL.fullmatch(self.checkpoint_every)), "such as 1epochs or 500steps"
        )
        if self.tracking_uri is not None:
            check_tracking_uri(self.tracking_uri)
        if self.pretrained_model is not None:
            get_published_weights(self.pretrained_model)
        elif self.training.freeze != "none":
            raise SettingsError(
                f"--freeze {self.training.freeze} leaves weights as they are, which nobody has trained: name those "
                "to start from with --pretrained_model, or set --freeze none"
            )

    @property
    def num_kept(self) -> int:
        """How many checkpoints are kept at most."""
        return sys.maxsize if self.keep_checkpoints == "all" else self.keep_checkpoints

    @property
    def run_folder(self) -> Path:
        """The folder that the run is written to."""
        return self.experiments_folder / self.experiment_name / self.run_name

    @property
    def reading(self) -> Reading:
        """How image files are read."""
        return Reading(fit=self.fit, skip_bad=self.skip_bad, image_size=self.training.image_size)

    @property
    def dataset(self) -> Path:
        """The data set: dataset_folder, or db:NAME@VERSION."""
        return self.dataset_folder if self.database is None else Path(DATABASE_PREFIX + self.database)

    @property
    def database_access(self) -> DatabaseAccess:
        """How the database is reached, if the data set lies in one.

        Raises:
            SettingsError: db_pass_file cannot be read.
        """
        password = self.db_password
        if password is None and self.database is not None:
            password = resolve_password(self.db_pass_file)
        return DatabaseAccess(
            config=self.db_config, password=password, ask=self.ask_db_password, dataset_folder=self.dataset_folder
        )

    @property
    def pretrained_path(self) -> Path | None:
        """The weights to start from: the path under the experiments folder if it exists there, else as given."""
        if self.pretrained_model is None or get_published_weights(self.pretrained_model):
            return self.pretrained_model
        below = self.experiments_folder / self.pretrained_model
        return below if below.exists() else self.pretrained_model

    def compute_checkpoint_steps(self, steps_per_epoch: int) -> int:
        """Compute the number of steps between two checkpoints."""
        count, unit = _INTERVAL.fullmatch(self.checkpoint_every).groups()  # type: ignore[union-attr]  # checked above
        return int(count) * (max(steps_per_epoch, 1) if unit == "epochs" else 1)


FLAGS = {
    "resume": "continue the interrupted run of this name from its last good checkpoint",
    "skip_bad": "leave out images that cannot be read; the record counts and names them",
    "mirror_checkpoints": "copy each checkpoint to --mirror too, so that another machine can --resume the run",
    "profile": "measure where the time of a few steps goes; the run folder gets profile/ with a table and a trace",
    "allow_code_change": "resume although this package's code is not the code of the record",
    "allow_environment_change": "resume although the installed libraries are not those of the record",
    "allow_other_machine": "resume although this machine is of another class; puts a break into the digest chain",
}
"""The settings of RunSettings that are switches, with what each does."""


def _fits(name: str) -> bool:
    """Say whether a file system takes a name: of at most 255 bytes, in letters that there are."""
    try:
        return len(os.fsencode(name)) <= 255
    except UnicodeEncodeError:
        return False


def _check(settings: object, option: str, good: bool, takes: str) -> None:
    if not good:
        value = getattr(settings, option)
        got = ",".join(map(str, value)) if isinstance(value, tuple) else value
        raise SettingsError(f"--{option} takes {takes}, got: {quote_unprintable(str(got))}")


def _check_choices(settings: TrainingSettings) -> None:
    for setting in fields(settings):
        if setting.name in CHOICES:
            choices = get_args(CHOICES[setting.name])
            _check(settings, setting.name, getattr(settings, setting.name) in choices, "one of " + ", ".join(choices))
