"""Kaldi's log-mel features as a frontend of ESPnet."""

from typing import Any

import humanfriendly
import torch
from espnet2.asr.frontend.abs_frontend import AbsFrontend
from torch import Tensor

from espnet_kv.errors import ConfigError


class KaldiFbankFrontend(AbsFrontend):
    """Kaldi's filter banks, as torchaudio.compliance.kaldi.fbank computes them, without dither.

    Runtimes of Kaldi's family (sherpa-onnx, k2, WeNet) compute the same features on the device, so
    that a model trained with them is deployed without a conversion of features. Frames are those
    of `snip_edges=False`: one for each hop, with reflected samples at both ends. Samples are
    between -1 and 1.

    Args:
        fs: samples per second, e.g. 16000 or 16k.
        n_mels: mel bands F.
        win_length, hop_length: length of a window and distance of two windows in samples.
        fmin, fmax: limits of the mel bands in Hz; fmax <= 0 counts from fs / 2.

    Raises:
        ConfigError (a ValueError): a value is not allowed.
    """

    def __init__(
        self,
        fs: int | str = 16000,
        n_mels: int = 80,
        win_length: int = 400,
        hop_length: int = 160,
        fmin: float = 20.0,
        fmax: float = -400.0,
    ):
        super().__init__()
        self.fs = humanfriendly.parse_size(fs) if isinstance(fs, str) else fs
        if type(n_mels) is not int or n_mels < 4:
            raise ConfigError(
                f"frontend_conf.n_mels: {n_mels!r} is not a whole number of 4 or more"
            )
        if not 0 < hop_length <= win_length:
            raise ConfigError(
                f"frontend_conf.hop_length: {hop_length!r} is not more than 0 and at most "
                f"win_length {win_length!r}"
            )
        self.win_length, self.hop_length = win_length, hop_length
        self.snip_edges = False
        self._options: dict[str, Any] = {
            "sample_frequency": float(self.fs),
            "num_mel_bins": n_mels,
            # half a sample more, because torchaudio rounds to whole samples downwards
            "frame_length": 1000 * (win_length + 0.5) / self.fs,
            "frame_shift": 1000 * (hop_length + 0.5) / self.fs,
            "low_freq": fmin,
            "high_freq": fmax,
            "dither": 0.0,
        }

    @property
    def borders(self) -> tuple[int, int]:
        """Reflected samples before the first and after the last sample of a recording."""
        left = (self.win_length - self.hop_length) // 2
        return left, self.win_length - left - self.hop_length // 2

    def output_size(self) -> int:
        """F."""
        return int(self._options["num_mel_bins"])

    def forward(self, input: Tensor, input_lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the features of a batch.

        Args:
            input: (B, N) samples, or (B, N, channels), of which the first is used.
            input_lengths: (B,) samples of each recording.

        Returns:
            (B, T, F) features, zero after the end of a recording, and (B,) their numbers.
        """
        from torchaudio.compliance.kaldi import fbank

        if input.dim() == 3:
            input = input[:, :, 0]
        features = [
            fbank(x[None, :length].float(), snip_edges=self.snip_edges, **self._options)
            for x, length in zip(input, input_lengths.tolist(), strict=True)
        ]
        lengths = torch.tensor([len(f) for f in features], device=input.device)
        return torch.nn.utils.rnn.pad_sequence(features, batch_first=True), lengths
