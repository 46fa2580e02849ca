"""Commands that run the kernels of all ops on this machine's device: check and tune."""
