"""Data sets, splits and loaders; augmentation that works on whole batches, on the device."""
