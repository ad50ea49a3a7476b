"""Pictures and pages of a run and of a data set."""
