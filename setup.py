"""Packaging. The ranges say what the code was written for; constraints.txt pins what CI runs."""

from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
setup(
    name="imdm_scale",
    version="0.1.0",
    description="Distributed distillation of masked diffusion language models into few-step IMDMs",
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["imdm_scale", "imdm_scale.*"]),
    package_data={"imdm_scale.assets": ["*.xz", "*.md", "*.model", "teacher/*"]},
    install_requires=[
        "torch>=2.13,<3",
        "deepspeed>=0.19,<0.20",  # parallel/compat.py names private parts of these two
        "megatron-core>=0.16,<0.17",
        "datasets>=4,<6",
        "filelock>=3.12",
        "fsspec[http]>=2024.6",
        "huggingface_hub>=1,<3",
        "matplotlib>=3.8",
        "numpy>=1.26",
        "omegaconf>=2.4,<3",
        "pyyaml>=6",
        "rich>=13.7",
        "safetensors>=0.5",
        "sentencepiece>=0.2",
        "transformers>=5,<6",
        "wandb>=0.18",
        "zstandard>=0.22",
    ],
    extras_require={
        "test": ["hypothesis>=6.100", "mypy>=1.10", "pytest>=8", "ruff>=0.6", "scipy>=1.11", "types-PyYAML"],
        "hf": ["accelerate>=1"],
        "eval": ["mauve-text>=0.4"],
        "gs": ["gcsfs"],
        "s3": ["s3fs"],
    },
)
