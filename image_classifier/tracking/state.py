"""The training state: how it is recorded, digested, saved and restored."""

from __future__ import annotations

import math
import operator
from collections import OrderedDict
from typing import Any

import numpy as np
import torch
from torch import Tensor

from image_classifier.errors import DivergedError, RunError
from image_classifier.files import check_form
from image_classifier.model.classifier import Classifier
from image_classifier.plugins import is_own
from image_classifier.settings import TrainingSettings
from image_classifier.tracking.checkpoint import Checkpoints, check_state
from image_classifier.tracking.identity import compute_json_digest, compute_tensor_digests
from image_classifier.tracking.layout import CHAIN, CHECKPOINTS, METRICS
from image_classifier.tracking.run import RunFolder
from image_classifier.training.average import Average
from image_classifier.training.loop import Step

PARTS_PER_EPOCH = 20
"""Points of the loss curve in an epoch's line of metrics.jsonl."""


class TrainingState:
    """The state of a run between two steps.

    Attributes:
        step: steps taken so far.
        chain_head: the newest digest of the chain, each over the one before it; "" before the first.
    """

    def __init__(
        self,
        folder: RunFolder,
        classifier: Classifier,
        optimizer: torch.optim.Optimizer,
        training: TrainingSettings,
        steps_per_epoch: int,
        machine: dict[str, Any],
        average: Average[Classifier] | None = None,
    ) -> None:
        self.folder = folder
        self.classifier = classifier
        self.average = average
        self.optimizer = optimizer
        self.training = training
        self.machine = machine
        self.steps_per_epoch = steps_per_epoch
        self.num_steps = training.num_epochs * steps_per_epoch
        self.checkpoints = Checkpoints(folder.path / CHECKPOINTS, folder.disk)
        self.step = 0
        self.chain_head = ""
        self.learning_rate = 0.0
        self._best: dict[str, Any] = {}
        self._losses: list[Tensor] = []  # of each step of the present epoch, like the next two
        self._num_correct: list[Tensor] = []
        self._num_images: list[int] = []
        self._seconds = 0.0

    @property
    def epoch(self) -> int:
        """Epochs that are complete."""
        return self.step // self.steps_per_epoch

    @property
    def judged(self) -> Classifier:
        """What is validated, tested and saved: the classifier, or its average."""
        return self.classifier if self.average is None else self.average.classifier

    @property
    def best_epoch(self) -> int:
        """The epoch with the best validation accuracy so far, counted from 1; 0 where nobody asked for it."""
        return int(self._best.get("epoch", 0))

    @property
    def is_stopped_early(self) -> bool:
        """Whether the validation accuracy has not become better for so long that the run ends."""
        patience = self.training.early_stopping
        return patience > 0 and self.best_epoch > 0 and self.epoch - self.best_epoch >= patience

    def record_step(self, step: Step) -> None:
        """Take note of what a step did."""
        self.step = step.number
        self.learning_rate = step.learning_rate
        self._losses.append(step.loss)
        self._num_correct.append(step.num_correct)
        self._num_images.append(step.num_images)
        self._seconds += step.seconds

    def append_epoch(self, validation: dict[str, float]) -> dict[str, Any]:
        """Append the epoch that has just ended to metrics.jsonl, and return its line.

        Args:
            validation: loss and accuracy on the validation part, or nothing.

        Raises:
            RunError: the loss is not a number any more.
        """
        losses: list[float] = torch.stack(self._losses).tolist()
        num_images = sum(self._num_images)
        if not all(map(math.isfinite, losses)):
            loss = sum(losses)
            raise DivergedError(
                f"the training diverged in epoch {self.epoch}: the loss is {loss}; lower --learning_rate"
            )
        parts = np.array_split(losses, min(PARTS_PER_EPOCH, len(losses)))
        line = {
            "epoch": self.epoch,
            "step": self.step,
            # Sums that are rounded once, so that they are the same on every machine.
            "train_loss": math.fsum(map(operator.mul, losses, self._num_images)) / num_images,
            "train_accuracy": sum(torch.stack(self._num_correct).tolist()) / num_images,
            "loss_by_part": [math.fsum(part) / len(part) for part in parts],
            "learning_rate": self.learning_rate,
            "seconds": round(self._seconds, 3),
            "images_per_second": round(num_images / self._seconds, 1),
            **validation,
        }
        self.folder.append_line(METRICS, line)
        self._take_note_of_best(validation)
        self._losses, self._num_correct, self._num_images, self._seconds = [], [], [], 0.0
        return line

    def _take_note_of_best(self, validation: dict[str, float]) -> None:
        keeps_weights = self.training.keep == "best"
        if not (keeps_weights or self.training.early_stopping):
            return
        if validation["validation_accuracy"] > self._best.get("accuracy", -1.0):
            self._best = {"accuracy": validation["validation_accuracy"], "epoch": self.epoch}
            if keeps_weights:
                state = self.judged.state_dict()
                self._best["classifier"] = {name: tensor.detach().clone() for name, tensor in state.items()}

    def use_kept_weights(self) -> None:
        """Put the weights that become model.pth into the judged classifier: the last ones, or the best."""
        if "classifier" in self._best:
            self.judged.load_state_dict(self._best["classifier"])

    def get_tensors(self) -> dict[str, Tensor]:
        """All tensors of the state by name: weights, buffers, what the optimizer keeps for each weight, averages."""
        tensors = dict(self.classifier.state_dict())
        for name, parameter in self.classifier.named_parameters():
            kept = self.optimizer.state.get(parameter, {})
            tensors |= {f"{name}.{key}": value for key, value in kept.items() if isinstance(value, Tensor)}
        if self.average is not None:
            tensors |= {f"average.{name}": tensor for name, tensor in self.judged.state_dict().items()}
        return tensors

    def append_digest(self) -> dict[str, Any]:
        """Append the digest of the whole state to the chain, and return its line."""
        tensors = compute_tensor_digests(self.get_tensors())
        self.chain_head = compute_json_digest([self.chain_head, self.step, tensors])
        shortened = {name: digest[:16] for name, digest in tensors.items()}  # enough to name the first that differs
        line = {"step": self.step, "digest": self.chain_head, "tensors": shortened}
        self.folder.append_line(CHAIN, line)
        return line

    def _append_break(self) -> None:
        """Append to the chain that the run goes on on a machine of another class."""
        self.chain_head = compute_json_digest([self.chain_head, self.step, self.machine["digest"]])
        line = {"step": self.step, "digest": self.chain_head, "break": self.machine["class"]}
        self.folder.append_line(CHAIN, line)

    def save(self, keep: int) -> None:
        """Save a checkpoint from which the run continues to the bit, and keep the newest `keep` of them."""
        # Also networks that train whole have a layer that is fixed; of a frozen body it is worth a file.
        weights = self.classifier.named_parameters() if self.training.freeze == "body" else ()
        frozen = {name for name, weight in weights if not weight.requires_grad}
        self.checkpoints.save(self.step, {**self._build(), "lines": self.folder.sync_lines()}, keep, frozen)

    def dump(self) -> dict[str, Any]:
        """Give what another process needs to go on from here."""
        return {**self._build(), "step": self.step}

    def load(self, state: dict[str, Any]) -> None:
        """Take what another process gave."""
        self.optimizer.load_state_dict(state["optimizer"])
        self._take(state)

    def _build(self) -> dict[str, Any]:
        return {
            "classifier": self.classifier.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "chain_head": self.chain_head,
            "machine_digest": self.machine["digest"],
            "learning_rate": self.learning_rate,
            "best": self._best,
            "losses": _join(self._losses),
            "num_correct": _join(self._num_correct),
            "num_images": self._num_images,
            "seconds": self._seconds,
            **({} if self.average is None else {"average": self.judged.state_dict()}),
        }

    def restore(self, keep: int) -> None:
        """Go back to the newest checkpoint that is whole, or to the beginning, and forget all that came after it.

        Checkpoints before the newest `keep` are removed, as the process that was killed would have done.
        """
        self.checkpoints.remove_unfinished()
        state = self.checkpoints.load_newest(self._check)
        if state is None:
            self.folder.cut_lines({})
            return
        self._take(state)
        self.folder.cut_lines(state["lines"])
        self.checkpoints.remove_old(keep)
        if state["machine_digest"] != self.machine["digest"]:
            self._append_break()

    def _take(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        self.chain_head = state["chain_head"]
        self.learning_rate = state["learning_rate"]
        self.classifier.load_state_dict(state["classifier"])
        if self.average is not None:
            self.judged.load_state_dict(state["average"])
        self._best = state["best"]
        self._losses, self._num_correct = (
            list(state[name].to(self.training.device)) for name in ("losses", "num_correct")
        )
        self._num_images, self._seconds = state["num_images"], state["seconds"]

    def _check(self, state: dict[str, Any]) -> None:
        """Check that a checkpoint is one of this run, and let the optimizer take its part.

        Raises:
            ModelError: it holds another network.
            RunError: it lacks something, or the run's lines are not those that it counts on.
        """
        path = self.checkpoints.folder
        try:
            check_form(state, _FORM)
            check_state(self.classifier, state["classifier"], path)
            if self.average is not None:
                check_state(self.classifier, state["average"], path)
            if state["best"] and self.training.keep == "best":
                check_state(self.classifier, state["best"]["classifier"], path)
            if not state["losses"].shape == state["num_correct"].shape == (len(state["num_images"]),):
                raise ValueError("its numbers of losses and of steps differ")
            self.folder.check_lines(state["lines"])
            self._load_optimizer(state["optimizer"])  # last: what is refused must leave no trace
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise RunError(
                f"a checkpoint in {path} does not belong to this run: {' '.join(str(error).split())}"
            ) from error

    def _load_optimizer(self, state: dict[str, Any]) -> None:
        """Load what an optimizer has learnt; what was set, as learning rates and momentum, the settings say.

        An optimizer of another package may keep something there that changes.
        """
        if is_own("optimizer", self.training.optimizer):
            if len(state["param_groups"]) != len(self.optimizer.param_groups):
                raise ValueError(f"it has {len(state['param_groups'])} groups of parameters")
            state = {**state, "param_groups": self.optimizer.state_dict()["param_groups"]}
        self.optimizer.load_state_dict(state)


_STATE_DICT = (dict, OrderedDict)
_FORM = {
    "step": int,
    **dict.fromkeys(("chain_head", "machine_digest"), str),
    **dict.fromkeys(("learning_rate", "seconds"), float),
    **dict.fromkeys(("losses", "num_correct"), Tensor),
    "classifier": _STATE_DICT,
    "optimizer": dict,
    "best": dict,
    "num_images": [int],
    "lines": {str: {"size": int, "sha256": str}},
}


def _join(values: list[Tensor]) -> Tensor:
    # A tensor a step would make a checkpoint within a long epoch tens of thousands of files in an archive.
    return torch.stack(values).cpu() if values else torch.empty(0)
