"""What everything else stands on: errors, units, devices, files, tensors. Knows nothing of models or runs."""
