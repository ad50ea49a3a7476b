"""The trainer: `image_classifier_trainer`, or `python -m image_classifier.main`."""

import sys

from image_classifier.cli.train import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
