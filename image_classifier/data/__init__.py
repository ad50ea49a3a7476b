"""From a source on disk to batches of uint8 images: read, freeze, order, augment."""
