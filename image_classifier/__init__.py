"""Reproducible training of image classifiers: from a data set to a verified run and a published model.

The way the data goes, and the folder that each stage lies in::

    source ──> snapshot ──> batches ──> network ──> training loop ──> run folder ──> published model
    data/      data/        data/       model/      training/         tracking/      publishing/, serving/

`experiment.py` joins the stages on one page; `cli/` holds one file a command. `settings.py` has every setting,
`errors.py` every expected error. Nothing is imported here, so that `--help` answers at once.
"""

__version__ = "0.1.0"
