"""The networks: Helios transformer, Wan VAE, UMT5 text encoder. Parameters and forward passes only."""
