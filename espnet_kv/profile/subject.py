"""What is profiled: a trained model, or a configuration with random weights."""

import argparse
import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from espnet_kv.cache import EncoderState
from espnet_kv.encoder.streaming import StreamingEncoder, subsampling
from espnet_kv.encoder.whisper_encoder import KVWhisperEncoder
from espnet_kv.errors import UserError
from espnet_kv.espnet.openai_whisper import SAMPLE_RATE, WINDOW
from espnet_kv.espnet.task import CachedDecodingTask
from espnet_kv.espnet.whisper_weights import weights_follow
from espnet_kv.packed import pack_weights
from espnet_kv.streaming.frontend import StreamingFrontend
from espnet_kv.streaming.requirements import check_streams


@dataclass(frozen=True)
class Source:
    """Where a model comes from; small, so that another process can load the same.

    asr_train_config, asr_model_file: of a trained model; or
    config: a training configuration, vocab_size: its tokens, seed: of the random weights.
    """

    asr_train_config: str | None = None
    asr_model_file: str | None = None
    config: Mapping[str, Any] | None = None
    vocab_size: int = 5000
    seed: int = 0

    @property
    def trained(self) -> bool:
        return self.config is None

    def load(self, device: str) -> tuple[Any, argparse.Namespace]:
        """The model in eval mode, its decoder with a cache, and its training arguments.

        Raises:
            UserError: a file or a key cannot be used.
        """
        if self.trained:
            assert self.asr_train_config is not None and self.asr_model_file is not None
            model, args = CachedDecodingTask.build_model_from_file(
                self.asr_train_config, self.asr_model_file, device
            )
        else:
            model, args = self._build()
        return model.to(device).eval(), args

    def _build(self) -> tuple[Any, argparse.Namespace]:
        config = CachedDecodingTask.get_default_config() | dict(self.config or {})
        args = argparse.Namespace(**config)
        if not str(args.encoder).startswith("kv_"):
            raise _no_cache(args.encoder)
        pieces = [f"<{n}>" for n in range(max(0, self.vocab_size - 3))]
        args.token_list = ["<blank>", "<unk>", *pieces, "<sos/eos>"]
        args.token_type = args.bpemodel = None
        # statistics of features need data
        args.normalize, args.normalize_conf = None, {}
        torch.manual_seed(self.seed)
        try:
            with weights_follow():  # random ones: those of a public name are not needed
                return CachedDecodingTask.build_model(args), args
        except (TypeError, KeyError, AttributeError) as error:
            line = " ".join(str(error).split())
            raise UserError(f"the configuration builds no model: {line}") from error


def _no_cache(encoder: str) -> UserError:
    return UserError(
        f"encoder: {encoder} keeps no cache that could be profiled: convert the model "
        "(python -m espnet_kv.bin.convert --help), or train one with "
        f"encoder: kv_{encoder.removeprefix('kv_')}"
    )


@dataclass(frozen=True)
class Subject:
    """A loaded model and how it streams.

    chunk_size, left_chunks: of streaming, in encoder frames and chunks.
    """

    source: Source
    model: Any
    args: argparse.Namespace
    device: str
    chunk_size: int
    left_chunks: int
    streams: ClassVar[bool] = True
    most_seconds: ClassVar[float] = math.inf  # that the encoder takes

    @classmethod
    def load(cls, source: Source, device: str, chunk_size: int, left_chunks: int) -> "Subject":
        """Load a model and see that it streams, or is one of Whisper.

        Raises:
            UserError: it cannot be loaded, or does neither; one line says why.
        """
        model, args = source.load(device)
        if isinstance(model.encoder, KVWhisperEncoder):
            return WhisperSubject(source, model, args, device, chunk_size, left_chunks)
        if not isinstance(model.encoder, StreamingEncoder):
            raise _no_cache(str(args.encoder))
        check_streams(model, args, ctc_weight=1.0)
        subject = cls(source, model, args, device, chunk_size, left_chunks)
        subject.frontend()
        subject.init_state()
        pack_weights(subject.model.encoder)  # as the commands do
        pack_weights(subject.model.ctc)
        return subject

    @property
    def encoder(self) -> Any:
        return self.model.encoder

    def frontend(self) -> StreamingFrontend:
        """The model's features, of a stream that has not begun."""
        return StreamingFrontend(self.model.frontend, self.model.normalize)

    @property
    def sample_rate(self) -> int:
        return self.frontend().sample_rate

    @property
    def stride(self) -> int:
        """Features to an encoder frame."""
        return subsampling(self.encoder.embed)[0]

    @property
    def features_per_second(self) -> float:
        return self.sample_rate / self.frontend().hop_length

    @property
    def frame_seconds(self) -> float:
        return self.stride / self.features_per_second

    @property
    def chunk_seconds(self) -> float:
        return self.chunk_size * self.frame_seconds

    def init_state(self) -> EncoderState:
        """One stream with the subject's settings."""
        return self.encoder.init_state(
            chunk_size=self.chunk_size, left_chunks=self.left_chunks, device=self.device
        )

    def offline(self) -> AbstractContextManager[None]:
        """Within it the encoder sees whole utterances."""
        return self.encoder.chunks(chunk_size=0)

    def encode(self, xs: Tensor) -> None:
        """Call the encoder with (1, T, F) features."""
        # with lengths as a list: of a tensor ESPnet makes padding masks by way of a square of T x T
        # features, which at ten minutes is larger than everything else together
        self.encoder(xs, [xs.size(1)])


class WhisperSubject(Subject):
    """A loaded Whisper model, which encodes whole utterances; chunk settings have no effect."""

    streams = False
    most_seconds = WINDOW

    @property
    def sample_rate(self) -> int:
        return SAMPLE_RATE

    @property
    def frame_seconds(self) -> float:
        return 2 * self.encoder.hop_length / SAMPLE_RATE  # the second convolution halves features

    def offline(self) -> AbstractContextManager[None]:
        return nullcontext()

    def encode(self, xs: Tensor) -> None:
        """Call the encoder with (1, N) samples, of which it makes features itself."""
        self.encoder(xs, torch.tensor([xs.size(1)]))


def encoder_with(subject: Subject, attention_type: str, **attention_conf: Any) -> nn.Module:
    """An encoder of the subject's sizes with another attention and random weights."""
    conf = dict(subject.args.encoder_conf)
    conf |= {"attention_type": attention_type, "attention_conf": attention_conf}
    encoder = type(subject.encoder)(subject.model.frontend.output_size(), **conf)
    return encoder.to(subject.device).eval()
