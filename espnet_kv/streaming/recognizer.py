"""Streaming recognition: features, encoder with cache, CTC search, attention rescoring."""

import argparse
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from espnet_kv.encoder.streaming import subsampling
from espnet_kv.errors import ArgumentError, UserError
from espnet_kv.espnet.loading import load_tokenizer
from espnet_kv.espnet.packs import unpacked
from espnet_kv.espnet.parser import check_numbers
from espnet_kv.espnet.task import ASRTask
from espnet_kv.streaming.engine import EngineBuilder, TorchEngine
from espnet_kv.streaming.frontend import StreamingFrontend, TooShortError
from espnet_kv.streaming.hotwords import read_hotwords
from espnet_kv.streaming.requirements import check_streams
from espnet_kv.streaming.segments import SegmentDecoder
from espnet_kv.streaming.transcript import Result, ResultBuilder

DTYPES = ("float16", "bfloat16", "float32", "float64")
# longer pieces are split, to bound the memory of one step
LONGEST_PIECE_SECONDS = 10


class StreamingRecognizer:
    """Streaming speech recognition with the interface of ESPnet's Speech2TextStreaming.

        recognizer = StreamingRecognizer("exp/asr_x/config.yaml", "exp/asr_x/valid.acc.ave.pth",
                                         chunk_size=16, left_chunks=4)
        for piece in pieces:
            (text, *_), = recognizer(piece, is_final=False)   # so far
        results = recognizer(last_piece, is_final=True)       # n-best; ready for the next stream
        results[0].words                                      # with times and confidences

    Tokens come from CTC prefix beam search. At the end of a segment, the attention decoder rescores
    the hypotheses: score = ctc_weight * ctc + (1 - ctc_weight) * attention + penalty * tokens
    + hotwords (hybrid CTC/attention rescoring, U2, arXiv 2012.05481). The result does not depend on
    how the audio is split.

    Without endpoints a segment is the whole stream. With endpoints, the words before a pause are
    final and the encoder output held for rescoring is freed, so only the text grows with the
    stream. The encoder state continues across segments.

    Args:
        asr_train_config: config.yaml of the experiment.
        asr_model_file: the checkpoint; loaded strictly.
        asr_model: a loaded model, together with `asr_train_args` instead of the two files. It is
            moved to `device` and `dtype` and put into eval mode in place. Several recognizers may
            share it.
        chunk_size: encoder frames in a chunk; None: the model's setting.
        left_chunks: number of chunks of left context, -1 = all; None: the model's setting.
        cache_dtype: fp32, fp16, bf16, int8, int4 for the encoder's cache; None: the model's type.
        beam_size: prefixes in the CTC beam; 1 = the best path (greedy).
        ctc_weight: weight of CTC, the decoder having 1 - ctc_weight; 1.0, or a model without
            decoder: CTC alone, and no encoder output is held.
        penalty: added to the score for every token.
        nbest: hypotheses in the result.
        endpoint_silence_ms: duration of CTC blank that ends a segment; 0 = pauses do not.
        max_segment_seconds: maximum length of a segment; 0 = no limit.
        hotwords: file of phrases that the search prefers, see `read_hotwords`; needs a beam.
        hotwords_score: added for every token of a phrase without a score in the file.
        token_type, bpemodel: None: the model's setting.
        engine: what runs encoder and CTC; the model itself, or see `export.onnx_engine`.

    Raises:
        UserError: a file or a value cannot be used.
    """

    def __init__(
        self,
        asr_train_config: Path | str | None = None,
        asr_model_file: Path | str | None = None,
        *,
        asr_model: Any = None,
        asr_train_args: argparse.Namespace | None = None,
        chunk_size: int | None = None,
        left_chunks: int | None = None,
        cache_dtype: str | None = None,
        beam_size: int = 10,
        ctc_weight: float = 0.5,
        penalty: float = 0.0,
        nbest: int = 1,
        endpoint_silence_ms: float = 0,
        max_segment_seconds: float = 0,
        hotwords: Path | str | None = None,
        hotwords_score: float = 1.5,
        token_type: str | None = None,
        bpemodel: str | None = None,
        device: str = "cpu",
        dtype: str = "float32",
        engine: EngineBuilder = TorchEngine,
    ):
        check_numbers(
            beam_size=beam_size,
            nbest=nbest,
            ctc_weight=ctc_weight,
            endpoint_silence_ms=endpoint_silence_ms,
            max_segment_seconds=max_segment_seconds,
            penalty=penalty,
        )
        if dtype not in DTYPES:
            raise ArgumentError("dtype", f"{dtype}: unknown (allowed: {', '.join(DTYPES)})")
        if asr_model is None:
            if asr_train_config is None or asr_model_file is None:
                raise UserError("give asr_train_config and asr_model_file")
            asr_model, asr_train_args = ASRTask.build_model_from_file(
                asr_train_config, asr_model_file, device
            )
        elif asr_train_args is None:
            raise UserError("asr_model needs its asr_train_args")
        check_streams(asr_model, asr_train_args, ctc_weight)
        asr_model.to(device=device, dtype=getattr(torch, dtype)).eval()
        for module in (asr_model.frontend, asr_model.normalize):
            if module is not None and dtype in ("float16", "bfloat16"):
                module.float()  # a power spectrum exceeds the range of 16 bits
        self.asr_model, self.asr_train_args = asr_model, asr_train_args
        self.engine = engine(asr_model, chunk_size, left_chunks, cache_dtype)
        self.chunk_size, self.left_chunks = self.engine.chunk_size, self.engine.left_chunks
        self.cache_dtype = cache_dtype
        self.frontend = StreamingFrontend(asr_model.frontend, self.engine.normalize)
        self.device, self.dtype = device, getattr(torch, dtype)
        self.tokenizer = load_tokenizer(asr_train_args, token_type, bpemodel)
        phrases = None
        if hotwords is not None:
            if beam_size == 1:
                raise UserError("--hotwords needs a beam: give beam_size 2 or more")
            phrases = read_hotwords(hotwords, hotwords_score, self.tokenizer, asr_model.token_list)
        self.decoder = SegmentDecoder(
            asr_model,
            ResultBuilder(asr_model, self.tokenizer, self.frame_seconds),
            beam_size=beam_size,
            ctc_weight=ctc_weight,
            penalty=penalty,
            nbest=nbest,
            silence_frames=math.ceil(endpoint_silence_ms / 1000 / self.frame_seconds),
            max_frames=math.ceil(max_segment_seconds / self.frame_seconds),
            hotwords=phrases,
        )
        self.peak_nbytes: dict[str, int] = {}  # maximum of `nbytes_by_kind` over all streams
        self.reset()

    @classmethod
    def from_pretrained(cls, model_tag: str, **options: Any) -> "StreamingRecognizer":
        """The recognizer of a packed model: a zip, or a tag that espnet_model_zoo knows.

        Args:
            model_tag: path of the zip, or the tag.
            **options: as those of the class, but for the two files.

        Raises:
            UserError: see `espnet_kv.espnet.packs.unpacked` and the class.
        """
        files = unpacked(model_tag)
        return cls(files["asr_train_config"], files["asr_model_file"], **options)

    @property
    def sample_rate(self) -> int:
        """Samples per second of the model."""
        return self.frontend.sample_rate

    @property
    def frame_seconds(self) -> float:
        """Duration of an encoder frame."""
        stride, _ = subsampling(self.asr_model.encoder.embed)
        return stride * self.frontend.hop_length / self.sample_rate

    def reset(self) -> None:
        """Discard the stream; the next piece begins a new one."""
        self._state = self.engine.init_state()
        self.frontend.reset()
        self._segments: list[list[Result]] = []  # before the open one, for `__call__`
        self._stream = self.decoder.open_stream()

    @torch.no_grad()
    def __call__(self, speech: Tensor | np.ndarray, is_final: bool = True) -> list[Result]:
        """Process a piece of the stream and return the text of the stream so far.

        Args:
            speech: (N,) samples between -1 and 1 at `sample_rate`, N >= 0.
            is_final: the stream ends with this piece; the next piece begins a new stream.

        Returns:
            Before the last piece, the best result so far, without rescoring. After it, up to
            `nbest` results, best first; with endpoints they differ only in the last segment.

        Raises:
            UserError: the samples are not finite floating-point numbers.
            TooShortError: the stream ended before its first features.
        """
        segments = [*self._segments, *self.accept(speech, is_final)]
        if is_final:
            return self.join(segments)
        self._segments = segments
        return self.join([*segments, [self.partial]])

    @torch.no_grad()
    def accept(self, speech: Tensor | np.ndarray, is_final: bool = False) -> list[list[Result]]:
        """Process a piece of an endless stream and return the segments that ended in it.

        Returned segments are not kept; `partial` is the result of the open segment.

        Args:
            speech, is_final: as in `__call__`.

        Returns:
            The n-best results of each ended segment with words; an argument for `join`.

        Raises:
            UserError, TooShortError: as `__call__`.
        """
        is_final = bool(is_final)  # it may be a NumPy bool
        speech = torch.as_tensor(speech).to(self.device)
        pieces = speech.split(LONGEST_PIECE_SECONDS * self.sample_rate)
        ended = []
        for number, piece in enumerate(pieces, start=1):
            ended += self._accept(piece, is_final and number == len(pieces))
        if is_final:
            ended += self.decoder.end_segment(self._stream)
            self.reset()
        return [results for results in ended if results[0][2]]

    def join(self, segments: list[list[Result]]) -> list[Result]:
        """N-best results of consecutive segments: the best of each, and the n-best of the last."""
        if not segments:
            return [self.decoder.results.build([], [], 0.0, {}, (0.0, 0.0))]
        earlier = [results[0] for results in segments[:-1]]
        return [self.decoder.results.join([*earlier, result]) for result in segments[-1]]

    @property
    def partial(self) -> Result:
        """The best result of the open segment, without rescoring."""
        return self.decoder.best(self._stream)

    def nbytes_by_kind(self) -> dict[str, int]:
        """Bytes held between two pieces.

        attention, conv, input: the encoder's cache; waveform: samples for the next frames;
        encoder_out: encoder output of the open segment, for rescoring.
        """
        own = {"waveform": self.frontend.nbytes, "encoder_out": self._stream.nbytes}
        return self._state.nbytes_by_kind() | own

    def _accept(self, speech: Tensor, is_final: bool) -> list[list[Result]]:
        """Process a short piece; return the results of segments that ended in it."""
        try:
            features = self.frontend(speech, is_final).to(self.dtype)  # (T, F)
        except TooShortError:
            self.reset()
            raise
        if not is_final and not len(features):
            return []
        # (T, F) -> (T', V), (T', D)
        log_probs, encoded, self._state = self.engine.encode(features, self._state, is_final)
        ended = self.decoder.advance(self._stream, encoded, log_probs)
        for kind, held in self.nbytes_by_kind().items():
            self.peak_nbytes[kind] = max(held, self.peak_nbytes.get(kind, 0))
        return ended
