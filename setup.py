"""The wheel's packages, with configs/ as helios_jax.configs; all else is in pyproject.toml, which cannot say this."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["helios_jax*", "pallas_kernels*"]), "helios_jax.configs"],
    package_dir={"helios_jax.configs": "configs"},
)
