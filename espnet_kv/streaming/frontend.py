"""Incremental computation of ESPnet's features."""

import copy

import torch
from espnet2.asr.frontend.default import DefaultFrontend
from espnet2.layers.abs_normalize import AbsNormalize
from espnet2.layers.global_mvn import GlobalMVN
from torch import Tensor

from espnet_kv.encoder.kaldi_fbank import KaldiFbankFrontend
from espnet_kv.errors import ConfigError, UserError


class TooShortError(UserError):
    """A recording is too short for one frame of features."""


class StreamingFrontend:
    """Computes the features of a waveform in pieces; they equal ESPnet's for the whole file.

    The model's own modules compute frames, mel bands and normalisation. This class keeps the
    samples for the next frame and adds the reflected samples at both ends, as torch.stft does for
    `center=True` and Kaldi for `snip_edges=false`.

    Between two pieces it holds fewer than n_fft + hop_length samples.

    Args:
        frontend: the model's frontend (in eval mode, weights and buffers are shared).
        normalize: the model's normalisation of features.

    Raises:
        ConfigError: the frontend or the normalisation needs the whole utterance.
    """

    def __init__(
        self,
        frontend: DefaultFrontend | KaldiFbankFrontend,
        normalize: AbsNormalize | None = None,
    ):
        _check_streams(frontend, normalize)
        self._frontend = copy.copy(frontend)
        self._normalize = normalize
        if isinstance(frontend, KaldiFbankFrontend):
            self._frontend.snip_edges = True
            self.n_fft, self.hop_length = frontend.win_length, frontend.hop_length
            self.borders = frontend.borders
            self._first = 0  # the reflection at an edge repeats the sample there
            self._fewest = self.n_fft
            self.sample_rate = frontend.fs
            self._dtype = torch.float32
        else:
            stft = copy.copy(frontend.stft)
            stft.center = False
            self._frontend._modules = {**frontend._modules, "stft": stft}
            self.n_fft, self.hop_length = stft.n_fft, stft.hop_length
            self.borders = (self.n_fft // 2,) * 2 if frontend.stft.center else (0, 0)
            self._first = 1
            self._fewest = self.borders[0] + 1 if frontend.stft.center else self.n_fft
            self.sample_rate = int(frontend.logmel.mel_options["sr"])
            self._dtype = frontend.logmel.melmat.dtype
        self.reset()

    def reset(self) -> None:
        """Discard the stream; the next piece begins a new one."""
        self._samples: Tensor | None = None  # None: too few samples for the left border
        self._first_samples = torch.zeros(0)  # samples so far while `_samples` is None
        self._skip = 0  # samples of `_samples` before the first sample of the next frame

    @property
    def nbytes(self) -> int:
        """Bytes of the samples held for the next piece."""
        held = self._first_samples if self._samples is None else self._samples
        return held.untyped_storage().nbytes()

    def __call__(self, speech: Tensor, is_final: bool = False) -> Tensor:
        """Process the next samples and return the complete features.

        Args:
            speech: (N,) float samples, any N >= 0; (N, channels) are averaged.
            is_final: the stream ends with this piece; the next piece begins a new stream.

        Returns:
            (T, F) features, T >= 0.

        Raises:
            UserError: the samples are not finite floating-point numbers.
            TooShortError: the stream ended before its first frame; it is discarded.
        """
        samples = self._with_left_border(checked(speech).to(self._dtype))
        if samples is None:
            if is_final:
                count = len(self._first_samples)
                self.reset()
                raise TooShortError(
                    f"{count} samples of audio are too few: features need at least "
                    f"{self._fewest} ({1000 * self._fewest / self.sample_rate:.0f} ms)"
                )
            return speech.new_zeros(0, self._frontend.output_size())
        right = self.borders[1]
        if is_final and right:
            last = len(samples) - self._first
            samples = torch.cat([samples, samples[last - right : last].flip(0)])
        frames = max(0, (len(samples) - self._skip - self.n_fft) // self.hop_length + 1)
        features = self._features(samples[self._skip :], frames)
        if is_final:
            self.reset()
        else:
            self._skip += frames * self.hop_length
            # keep the samples that the right border may need
            drop = max(0, min(self._skip, len(samples) - right - self._first))
            self._samples = samples[drop:].clone()
            self._skip -= drop
        return features

    def _with_left_border(self, speech: Tensor) -> Tensor | None:
        """The samples held and `speech`, with the left border; None: too few samples."""
        if self._samples is not None:
            return torch.cat([self._samples, speech])
        self._first_samples = torch.cat([self._first_samples.to(speech), speech])
        if len(self._first_samples) < self._fewest:
            return None
        samples, self._first_samples = self._first_samples, torch.zeros(0)
        left = samples[self._first : self._first + self.borders[0]]
        return torch.cat([left.flip(0), samples])

    def _features(self, samples: Tensor, frames: int) -> Tensor:
        """The first `frames` frames of `samples`, (frames, F)."""
        if not frames:
            return samples.new_zeros(0, self._frontend.output_size())
        samples = samples[: (frames - 1) * self.hop_length + self.n_fft]
        with torch.no_grad():
            lengths = torch.tensor([len(samples)], device=samples.device)
            features, lengths = self._frontend(samples[None], lengths)
            if self._normalize is not None:
                features, _ = self._normalize(features, lengths)
        return features[0]


def checked(speech: Tensor) -> Tensor:
    """(N,) samples of audio of shape (N,), or (N, channels), which are averaged.

    Raises:
        UserError: the samples are not finite floating-point numbers.
    """
    if not speech.is_floating_point():
        raise UserError(f"audio has the type {speech.dtype}: scale it to floats between -1 and 1")
    if speech.dim() not in (1, 2):
        raise UserError(f"audio has the shape {tuple(speech.shape)}: expected (samples,)")
    if not torch.isfinite(speech).all():
        raise UserError("the audio holds samples that are infinite or NaN")
    return speech.mean(dim=1) if speech.dim() == 2 else speech


def _check_streams(frontend: object, normalize: AbsNormalize | None) -> None:
    if not isinstance(frontend, DefaultFrontend | KaldiFbankFrontend):
        name = "none" if frontend is None else type(frontend).__name__
        raise ConfigError(f"frontend: {name} does not stream; use default or kaldi_fbank")
    if isinstance(frontend, DefaultFrontend):
        _check_default(frontend)
    if normalize is not None and not isinstance(normalize, GlobalMVN):
        raise ConfigError(
            f"normalize: {type(normalize).__name__} needs the whole utterance before the first "
            "frame; train with normalize: global_mvn"
        )


def _check_default(frontend: DefaultFrontend) -> None:
    if frontend.stft is None:
        raise ConfigError("frontend_conf.apply_stft: false does not stream; set it to true")
    for key in ("use_wpe", "use_beamformer"):
        if getattr(frontend.frontend, key, False):
            raise ConfigError(f"frontend_conf.{key}: true needs the whole utterance; set false")
