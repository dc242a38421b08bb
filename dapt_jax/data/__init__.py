"""Images and labels: readers, splits, phantoms, augmentation and the input pipeline."""
