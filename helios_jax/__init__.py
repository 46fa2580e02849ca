"""Helios, the 14B real-time long-video model (arXiv 2603.04379), in JAX.

Axis letters, the same in einops patterns, einsums and shape annotations throughout:

    b   batch                     t   frames (latent or pixel; the name beside it says which)
    h   height                    w   width
    c   channels                  n   tokens of a sequence
    d   features of a token       m   tokens of the text
    heads, head_dim               attention heads and the features of one

Video is `[b, t, h, w, c]`, tokens `[b, n, d]`, attention `[b, n, heads, head_dim]`.
"""
