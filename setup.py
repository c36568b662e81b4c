"""Packaging of espnet_kv; tool settings are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "espnet_kv/__init__.py").read_text())[1]
# the recipe, by way of links in the package
RECIPE = (HERE / "espnet_kv/recipe_files.txt").read_text().split()

setup(
    name="espnet_kv",
    version=VERSION,
    description="KV-cache compression for ESPnet speech recognition",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.12",
    packages=find_packages(include=["espnet_kv", "espnet_kv.*"]),
    package_data={
        "espnet_kv": ["recipe_files.txt", *RECIPE],
        "espnet_kv.report": ["page.css", "page.js", "page.html.j2"],
        "espnet_kv.serve": ["page.css", "page.html", "page.js", "recorder.js"],
    },
    install_requires=[
        "espnet[asr,train]>=202611",
        "torch",
        "torchaudio",
        "sentencepiece",
        "kaldiio",
        "jiwer",
        "matplotlib",
        "pandas",
        "jinja2",
        "pydantic>=2.12",
        "pyyaml",
        "humanfriendly",
        "numpy",
        "soundfile",
        "soxr",
        "tensorboard",
        "typeguard",
        "scipy",
        "omniio",
        "tqdm",
        "psutil",
        "hydra-core",
        "omegaconf",
        "espnet_model_zoo",
        "huggingface_hub",
        "espeakng-loader",  # the voice of the embedded corpus
    ],
    extras_require={
        # --cluster: the first two come with ESPnet's extra `train` today
        "cluster": [
            "dask[distributed]",
            "distributed",
            "dask-jobqueue",
            "asyncssh",
        ],
        # espnet_kv.bin.export, --engine onnx; espnet_kv.bin.serve
        "serve": ["onnx", "onnxruntime", "aiohttp", "prometheus_client"],
        # token_type whisper_en or whisper_multilingual, encoder and decoder whisper or kv_whisper
        "whisper": ["openai-whisper", "tiktoken"],
        "dev": [
            "pytest",
            "pytest-xdist",
            "onnx",
            "onnxruntime",
            "aiohttp",
            "prometheus_client",
            "sherpa-onnx",
            "sherpa-onnx-bin",
            "openai-whisper",
            "tiktoken",
            "hypothesis",
            "ruff",
            "mypy",
            "types-PyYAML",
            "pre-commit",
        ],
    },
    entry_points={
        "console_scripts": [
            "espnet_kv_asr_train = espnet_kv.bin.asr_train:main",
            "espnet_kv_asr_inference = espnet_kv.bin.asr_inference:main",
            "espnet_kv_asr_inference_streaming = espnet_kv.bin.asr_inference_streaming:main",
            "espnet_kv_report = espnet_kv.bin.report:main",
            "espnet_kv_stream = espnet_kv.bin.stream:main",
            "espnet_kv_serve = espnet_kv.bin.serve:main",
            "espnet_kv_profile = espnet_kv.bin.profile:main",
            "espnet_kv_convert = espnet_kv.bin.convert:main",
            "espnet_kv_export = espnet_kv.bin.export:main",
            "espnet_kv_recipe = espnet_kv.bin.recipe:main",
        ]
    },
)
