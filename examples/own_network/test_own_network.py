"""The package's own suites, called with the network and the optimizer of this folder."""

from own_network import build, build_adamw

from image_classifier.testing.networks import check_network
from image_classifier.testing.optimizers import check_optimizer


def test_the_network_can_be_trained_resumed_verified_and_published() -> None:
    check_network(build, image_size=32, num_classes=10)


def test_the_optimizer_can_be_resumed_and_verified() -> None:
    check_optimizer(build_adamw)
