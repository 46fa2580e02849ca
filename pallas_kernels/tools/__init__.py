"""Commands that run every op's kernels on the device at hand: check and tune."""
