"""Analysis of captured images: drift, and accuracy of the predictions."""
