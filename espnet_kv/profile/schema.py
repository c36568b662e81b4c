"""The schema of profile.json: what the profile command writes, the report reads and the docs list.

The text below a key stands in docs/profile.md. Sizes are in bytes, times in ms, lengths
in seconds of audio, unless the key says otherwise. A key that is absent or null is not known.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from espnet_kv.errors import UserError, one_line
from espnet_kv.files import write_text
from espnet_kv.profile.validation import first_error

SCHEMA: Final = "espnet_kv.profile/3"

Count = Annotated[int, Field(ge=0)]
Number = Annotated[float, Field(ge=0)]
Interval = Annotated[list[Number], Field(min_length=2, max_length=2)]
Options = dict[str, Any]


class Part(BaseModel):
    """One object of the file. Unknown keys are ignored, so that later versions may add some."""

    model_config = ConfigDict(
        strict=True, frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        return {key: value for key, value in data.items() if value is not None}


class Model(Part):
    """What was profiled."""

    encoder: str
    """conformer, branchformer, e_branchformer, transformer, ... (without kv_)"""
    attention_type: str
    """of the encoder, as in the configuration"""
    attention_conf: Options = {}
    attention_label: str
    """the attention's own name for itself, options included: mla r64"""
    attention_colour_slot: Count | None = None
    """the attention's place in tables and its colour in figures; null: the next free one"""
    decoder: str | None = None
    """transformer, ... (without kv_)"""
    self_attention_type: str | None = None
    """of the decoder; this key and the next five are null or empty without a cached decoder"""
    self_attention_conf: Options = {}
    self_attention_label: str | None = None
    src_attention_type: str | None = None
    src_attention_conf: Options = {}
    src_attention_label: str | None = None
    weights: str
    """trained or random"""
    training_seed: int | None = None
    experiment: str | None = None
    """the directory; this path and the next three are as given"""
    config: str | None = None
    overlay: str | None = None
    model_file: str | None = None
    converted_from: Options | None = None
    """content of conversion.json, which a conversion writes beside the model"""
    parameters: Count | None = None
    parameter_bytes: Count | None = None
    macs_per_second: Number | None = None
    """multiply-accumulates of the encoder for one second of audio, streamed, left context full"""


class Settings(Part):
    """Under which conditions the model was measured."""

    device: str
    """cpu or cuda"""
    device_name: str | None = None
    dtype: str | None = None
    """of the parameters: float32, ..."""
    threads: Count | None = None
    seed: int | None = None
    chunk_size: Count | None = None
    """encoder frames in a chunk"""
    left_chunks: int | None = None
    """chunks before its own that a frame attends to; -1: all"""
    frame_ms: Number | None = None
    """audio per encoder frame"""
    audio: str | None = None
    """the wav.scp, or noise"""
    utterances: Count | None = None
    utterance_seconds: Number | None = None
    """sum over the utterances"""
    search: Options = {}
    """options of the beam search"""
    streaming_search: Options = {}
    tokens_per_second: Number | None = None
    """rate at which a search on random weights is made to emit tokens; null: trained weights"""
    command: str | None = None
    commit: str | None = None
    """of the package, -dirty where files differ from it; null outside a git checkout"""
    date: str | None = None
    """ISO 8601, UTC"""
    python: str | None = None
    torch: str | None = None
    espnet: str | None = None
    onnxruntime: str | None = None
    """null: not installed"""
    espnet_kv: str | None = None


class Kinds(Part):
    """Bytes of an encoder's state by kind."""

    attention: Count
    conv: Count = 0
    input: Count = 0

    @property
    def total(self) -> int:
        """All kinds together."""
        return self.attention + self.conv + self.input


class Held(Part):
    """Bytes of one stream between two chunks."""

    bytes: Kinds
    """held: those of the frames that the stream may still attend to, measured"""
    analytic: Kinds
    """held, computed from the configuration"""
    allocated: Kinds
    """of the storage: a ring has room for one chunk more, unbounded storage doubles as it fills"""

    @property
    def rest(self) -> int:
        """Allocated bytes other than those of attention."""
        return self.allocated.total - self.allocated.attention


class CacheLength(Part):
    """The cache of one stream after some audio."""

    seconds: Number
    frames: Count | None = None
    """encoded frames"""
    bounded: Held | None = None
    """with settings.left_chunks"""
    unbounded: Held | None = None
    """with left_chunks -1"""


class LayerKinds(Part):
    """Bytes of one encoder layer by kind."""

    attention: Count
    conv: Count = 0


class Layer(LayerKinds):
    """Bytes of one encoder layer, held, and allocated for them."""

    allocated: LayerKinds


class Cache(Part):
    """The cache of the encoder in one cache_dtype."""

    lengths: list[CacheLength] = []
    layers: list[Layer] = []
    """each encoder layer, bounded, at the longest length: held bytes by kind, and allocated"""
    position: Count | None = None
    """tables of relative positions, bounded; all streams with the same settings share them"""
    attention_bytes_per_frame: Number | None = None
    """held bytes that one frame adds while nothing is dropped; linear: 0"""
    attention_bytes_per_second: Number | None = None

    @property
    def longest(self) -> CacheLength | None:
        """The entry of the longest length."""
        return max(self.lengths, key=lambda length: length.seconds, default=None)


class DecoderKinds(Part):
    """Bytes of a decoder's state by kind."""

    decoder_self: Count
    decoder_cross: Count


class DecoderCache(Part):
    """The cache of the decoder after the step of a beam search that left most behind."""

    hypotheses: Count | None = None
    """of the beam"""
    tokens: Count | None = None
    """steps of the search"""
    frames: Count | None = None
    """of the utterance"""
    bytes: DecoderKinds
    """held, measured"""
    analytic: DecoderKinds
    """held, computed"""
    allocated: DecoderKinds
    bytes_per_token: Number | None = None
    """held bytes of a stored token; linear: 0"""
    bytes_per_frame: Number | None = None
    """held bytes that one encoder frame adds"""


class Ratio(Part):
    """Compression: allocated attention bytes of a reference over those of this model."""

    bounded: Number
    unbounded: Number


class Spread(Part):
    """Distribution of a time in ms."""

    mean: Number
    p50: Number
    p95: Number
    p99: Number


class TimeLength(Part):
    """Times at one length of audio."""

    seconds: Number
    encode_ms: Number | None = None
    """the encoder over the whole audio"""
    chunk_ms: Number | None = None
    """median of the last chunks of a stream"""


class Minute(Part):
    """Time per chunk in one minute of a long stream."""

    minute: Count
    chunk_ms: Number
    """median"""


class Time(Part):
    """Inference time."""

    utterance_ms: Spread | None = None
    """whole utterances: features, encoder, beam search"""
    rtf: Number | None = None
    """sum of those times over the length of the audio"""
    chunk_ms: Spread | None = None
    """forward_chunk with the left context full"""
    streaming_rtf: Number | None = None
    """features, chunks, CTC search and rescoring, over the length of the audio"""
    first_token_ms: Spread | None = None
    """from the first sample to the first token, waiting for audio included"""
    lengths: list[TimeLength] = []
    hour: list[Minute] = []
    """each minute of a stream of one hour, with --hour true"""


class EngineStream(Part):
    """One stream through an engine: encoder and CTC run by torch, or an exported graph."""

    cache_dtype: str | None = None
    """type of its caches; null: the model's own"""
    chunk_ms: Spread
    """a chunk through encoder and CTC, with the left context full"""
    streaming_rtf: Number | None = None
    """as time.streaming_rtf"""
    bytes: Kinds
    """held between two chunks with settings.left_chunks"""
    allocated: Kinds


class MemoryLength(Part):
    """Peak memory at one length of audio."""

    seconds: Number
    offline_bytes: Count | None = None
    """the encoder over the whole audio, by torch's allocator"""
    streaming_bytes: Count | None = None
    """a stream with its next chunk, by torch's allocator"""
    offline_rss_bytes: int | None = None
    """the same, by the growth of the process's resident set"""
    streaming_rss_bytes: int | None = None


class Memory(Part):
    """Peak memory above what the loaded model and its input take."""

    method: str | None = None
    """cuda allocator, or torch profiler"""
    lengths: list[MemoryLength] = []
    offline_bytes: Count | None = None
    """whole utterance, at the longest length"""
    streaming_bytes: Count | None = None
    """streamed, at the longest length"""
    offline_rss_bytes: int | None = None
    """whole utterance, at the longest length, by the growth of the process's resident set"""
    streaming_rss_bytes: int | None = None


class Rates(Part):
    """Error rates of one decoding, per cent."""

    wer: Number | None = None
    wer_interval: Interval | None = None
    """95 %, by bootstrap over utterances (2000 resamples, seed 0)"""
    cer: Number | None = None
    cer_interval: Interval | None = None
    decoding: str | None = None


class Profile(Part):
    """One profiled model."""

    version: Literal["espnet_kv.profile/3"] = Field(alias="schema")
    """version of this schema"""
    name: str
    """the experiment directory's name, or the stems of configuration and overlay"""
    model: Model
    settings: Settings
    cache: dict[str, Cache] = {}
    """by cache_dtype, the model's own type first"""
    decoder_cache: DecoderCache | None = None
    compression: dict[str, Ratio] = {}
    """mha, input: allocated attention bytes of the same encoder with mha, or with mha that caches
    layer inputs, over those of this model"""
    time: Time = Time()
    memory: Memory = Memory()
    engines: dict[str, EngineStream] = {}
    """torch, onnx (model.onnx), onnx int8 (model.int8.onnx); empty where no graph was measured"""
    wer: dict[str, dict[str, Rates]] = {}
    """by mode (offline; streaming; ...), then test set; sets that were not scored are absent"""

    @property
    def cache_dtype(self) -> str | None:
        """The model's own type, which the headline figures are in."""
        return next(iter(self.cache), None)

    @property
    def own_cache(self) -> Cache | None:
        """The cache in the model's own type."""
        return self.cache.get(self.cache_dtype or "")

    def bounded(self, cache_dtype: str | None = None) -> Held | None:
        """The headline: one bounded stream at the longest length, in the model's own type."""
        cache = self.cache.get(cache_dtype) if cache_dtype else self.own_cache
        longest = cache.longest if cache else None
        return longest.bounded if longest else None


def read_profile(path: Path) -> Profile:
    """The profile in the file `path`.

    Raises:
        UserError: the file cannot be read or is not a profile of this version, or a key is missing
            or has a wrong value; names the file and the key.
    """
    try:
        return Profile.model_validate_json(path.read_bytes())
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist: profile the model first (stage 14)") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({one_line(error)})") from error
    except ValidationError as error:
        raise UserError(
            f"{path}: {first_error(error)}: remove it and profile again (stage 14)"
        ) from error


def read_profiles(paths: Iterable[Path]) -> list[Profile]:
    """The profiles in `paths`, in their order; a path that is given twice counts once.

    Raises:
        UserError: see `read_profile`; or there is no path.
    """
    profiles = [read_profile(path) for path in dict.fromkeys(paths)]
    if not profiles:
        raise UserError("there is no profile to report: profile a model first (stage 14)")
    return profiles


def write_profile(path: Path, content: Mapping[str, Any]) -> None:
    """Write a profile in one step.

    Args:
        content: the profile; every key must be in the schema.

    Raises:
        ValidationError: `content` does not match the schema (an error of the program).
    """
    profile = Profile.model_validate(content, extra="forbid")
    write_text(path, profile.model_dump_json(indent=1, by_alias=True) + "\n")
