"""Hand-made profiles in the format of `espnet_kv.bin.profile`, for tests of the report."""

import json
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any, get_args, get_origin

from espnet_kv.profile.schema import SCHEMA, Options, Part, Profile

LAYERS, WIDTH, HEADS, CHUNK, FRAME_MS = 4, 80, 4, 16, 40.0
SECONDS = (5.0, 60.0, 600.0)
NUMBERS = {"mha": 2 * WIDTH, "gqa": WIDTH, "mla": 16, "linear": 0}
LABELS = {"gqa": "gqa G2", "mla": "mla r16"}
CONF = {"gqa": {"num_kv_heads": 2}, "mla": {"kv_rank": 16}}
BITS = {"fp32": 32, "fp16": 16, "int8": 8, "int4": 4}
CONSTANT = LAYERS * HEADS * 21 * 20 * 4
WORDS = {"mha": 1.1, "gqa": 1.4, "mla": 1.2, "linear": 2.4}


def make_profile(
    encoder: str = "conformer",
    attention: str = "mha",
    /,
    *,
    left_frames: int = 64,
    cache_dtypes: tuple[str, ...] = ("fp32", "int8"),
    **parts: Any,
) -> dict[str, Any]:
    """A complete profile; `parts` replace its keys, with __ for a dot in the name.

    `model__weights="random"` sets one key of model; `time=None` removes a part.
    """

    def kinds(frames: int, cache_dtype: str) -> dict[str, int]:
        numbers = LAYERS * frames * NUMBERS[attention]
        return {
            "attention": numbers * BITS[cache_dtype] // 8 or CONSTANT,
            "conv": LAYERS * 14 * WIDTH * 4,
            "input": 6 * 24 * 4,
        }

    def held(frames: int, slots: int, cache_dtype: str) -> dict[str, Any]:
        own = kinds(frames, cache_dtype)
        return {"bytes": own, "analytic": dict(own), "allocated": kinds(slots, cache_dtype)}

    def cache(cache_dtype: str) -> dict[str, Any]:
        lengths = []
        for seconds in SECONDS:
            frames = int(seconds * 1000 / FRAME_MS)
            doubled = 16 * CHUNK
            while doubled < frames:
                doubled *= 2
            lengths.append(
                {
                    "seconds": seconds,
                    "frames": frames,
                    "bounded": held(min(frames, left_frames), left_frames + CHUNK, cache_dtype),
                    "unbounded": held(frames, doubled, cache_dtype),
                }
            )
        attended, allocated = (
            lengths[-1]["bounded"][what]["attention"] // LAYERS for what in ("bytes", "allocated")
        )
        conv = 14 * WIDTH * 4
        layer = {
            "attention": attended,
            "conv": conv,
            "allocated": {"attention": allocated, "conv": conv},
        }
        per_frame = LAYERS * NUMBERS[attention] * BITS[cache_dtype] / 8
        return {
            "lengths": lengths,
            "layers": [layer] * LAYERS,
            "position": LAYERS * (left_frames + 2 * CHUNK - 1) * WIDTH * 4,
            "attention_bytes_per_frame": per_frame,
            "attention_bytes_per_second": per_frame * 1000 / FRAME_MS,
        }

    slower = {"mha": 1.0, "gqa": 0.95, "mla": 0.9, "linear": 0.8}[attention]
    profile = {
        "schema": SCHEMA,
        "name": f"asr_train_asr_{encoder}_{attention}_small",
        "model": {
            "encoder": encoder,
            "attention_type": attention,
            "attention_conf": CONF.get(attention, {}),
            "attention_label": LABELS.get(attention, attention),
            "attention_colour_slot": list(NUMBERS).index(attention),
            "decoder": "transformer",
            "self_attention_type": "mha",
            "self_attention_conf": {},
            "self_attention_label": "mha",
            "src_attention_type": "mha",
            "src_attention_conf": {},
            "src_attention_label": "mha",
            "weights": "trained",
            "training_seed": 2022,
            "experiment": f"exp/asr_train_asr_{encoder}_{attention}_small",
            "config": f"conf/train_asr_{encoder}_{attention}.yaml",
            "overlay": None,
            "model_file": "valid.acc.ave.pth",
            "converted_from": None,
            "parameters": 1_200_000,
            "parameter_bytes": 4_800_000,
            "macs_per_second": 31_000_000.0,
        },
        "settings": {
            "device": "cpu",
            "device_name": "a processor",
            "dtype": "float32",
            "threads": 1,
            "seed": 0,
            "chunk_size": CHUNK,
            "left_chunks": 4,
            "frame_ms": FRAME_MS,
            "audio": "dump/raw/test_clean/wav.scp",
            "utterances": 20,
            "utterance_seconds": 61.5,
            "search": {"beam_size": 10, "ctc_weight": 0.7},
            "streaming_search": {"beam_size": 10, "ctc_weight": 1.0},
            "tokens_per_second": None,
            "command": f"python -m espnet_kv.bin.profile --experiment exp/{encoder}_{attention}",
            "commit": "v1-3-gabcdef0",
            "date": "2026-11-25T10:00:00+00:00",
            "python": "3.12.1",
            "torch": "2.14.1",
            "espnet": "202611",
            "onnxruntime": "1.23.0",
            "espnet_kv": "0.1.0",
        },
        "cache": {cache_dtype: cache(cache_dtype) for cache_dtype in cache_dtypes},
        "decoder_cache": {
            "hypotheses": 10,
            "tokens": 20,
            "frames": 250,
            "bytes": {"decoder_self": 128_000, "decoder_cross": 160_000},
            "analytic": {"decoder_self": 128_000, "decoder_cross": 160_000},
            "allocated": {"decoder_self": 163_840, "decoder_cross": 160_000},
            "bytes_per_token": 640.0,
            "bytes_per_frame": 640.0,
        },
        "compression": {
            "mha": {"bounded": 2.0, "unbounded": 2.0},
            "input": {"bounded": 1.0, "unbounded": 1.0},
        },
        "time": {
            "utterance_ms": {"mean": 80.0 * slower, "p50": 78.0 * slower, "p95": 120.0, "p99": 130},
            "rtf": 0.03 * slower,
            "chunk_ms": {"mean": 6.2 * slower, "p50": 6.0 * slower, "p95": 7.0, "p99": 8.0},
            "streaming_rtf": 0.01 * slower,
            "first_token_ms": {"mean": 700.0, "p50": 690.0, "p95": 900.0, "p99": 950.0},
            "lengths": [
                {"seconds": s, "encode_ms": 4.0 * s * slower, "chunk_ms": 6.0 * slower}
                for s in SECONDS
            ],
            "hour": [{"minute": m, "chunk_ms": 6.0 * slower + 0.01 * (m % 3)} for m in range(60)],
        },
        "memory": {
            "method": "torch profiler",
            "lengths": [
                {
                    "seconds": s,
                    "offline_bytes": int(2e5 * s * slower),
                    "streaming_bytes": int(3e6 * slower),
                    "offline_rss_bytes": int(2.1e5 * s * slower),
                    "streaming_rss_bytes": int(4e6 * slower),
                }
                for s in SECONDS
            ],
            "offline_bytes": int(2e5 * SECONDS[-1] * slower),
            "streaming_bytes": int(3e6 * slower),
            "offline_rss_bytes": int(2.1e5 * SECONDS[-1] * slower),
            "streaming_rss_bytes": int(4e6 * slower),
        },
        "engines": {
            name: {
                "cache_dtype": None,
                "chunk_ms": {"mean": 6.3 * less, "p50": 6.1 * less, "p95": 7.0, "p99": 8.0},
                "streaming_rtf": 0.01 * less,
                "bytes": kinds(left_frames, "fp32"),
                "allocated": kinds(left_frames + room, "fp32"),
            }
            for name, less, room in (("torch", 1.0, CHUNK), ("onnx", 0.9, 0), ("onnx int8", 0.6, 0))
        },
        "wer": {
            mode: {
                "test_clean": rates(WORDS[attention] + n, 0.8, f"decode_{n}"),
                "test_other": rates(WORDS[attention] + 2 + n, 1.8, None),
            }
            for n, mode in enumerate(("offline", "streaming"))
        },
    }
    profile = deepcopy(profile)  # lists above hold one object several times
    for key, value in parts.items():
        *path, last = key.split("__")
        place = profile
        for name in path:
            place = place[name]
        place[last] = value
    return profile


def write_profile(path: Path, profile: dict[str, Any]) -> Path:
    """Write it as JSON; returns `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(profile, indent=1), encoding="utf-8")
    return path


def rates(wer: float, cer: float, decoding: str | None) -> dict[str, Any]:
    """Error rates with narrow intervals."""
    return {
        "wer": wer,
        "wer_interval": [wer - 0.04, wer + 0.04],
        "cer": cer,
        "cer_interval": [cer / 2, cer * 2],
        "decoding": decoding,
    }


def eight(**parts: Any) -> list[dict[str, Any]]:
    """The eight models; Branchformers are a little worse and a little slower."""
    profiles = [
        make_profile(encoder, attention, **parts)
        for encoder in ("conformer", "branchformer")
        for attention in NUMBERS
    ]
    for profile in profiles[4:]:
        for sets in profile["wer"].values():
            for found in sets.values():
                found["wer"] += 0.3
                found["wer_interval"] = [bound + 0.3 for bound in found["wer_interval"]]
    return profiles


def schema_keys(part: type[Part] = Profile, prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """Every key of the schema: path (lists are [], free keys *), type, explanation."""
    for name, field in part.model_fields.items():
        path, kind = prefix + (field.alias or name), field.annotation
        while get_args(kind) and kind != Options:
            if get_origin(kind) in (list, dict):
                path += "[]" if get_origin(kind) is list else ".*"
                kind = get_args(kind)[-1]
            else:  # X | None, Annotated[X, ...], Literal["x"]
                kind = get_args(kind)[0]
        yield path, kind, field.description or ""
        if isinstance(kind, type) and issubclass(kind, Part):
            yield from schema_keys(kind, f"{path}.")


def values_at(data: Any, path: str) -> list[Any]:
    """What stands at a path of `schema_keys`; a key that is absent is an error."""
    found = [data]
    for name in path.replace("[]", ".[]").split("."):
        if name == "[]":
            found = [one for many in found for one in many]
        elif name == "*":
            found = [one for many in found for one in many.values()]
        else:
            found = [one[name] for one in found]
    return found
