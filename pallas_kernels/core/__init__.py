"""Code and data that the kernels of all ops share."""
