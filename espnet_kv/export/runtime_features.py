"""Features as sherpa-onnx computes them, and a fitted map from them to those of a model.

Frames are 10 ms apart, the samples of a window are 25 ms, and frame t is centred at 10 t + 5 ms.
Samples at the ends are reflected. `nemo_features` equals what sherpa-onnx 2.0.1 gives to a model
`nemo_ctc`.

Shape letters: N samples, T frames, F features of the runtime and of the model.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy
import torch
import torchaudio
from torch import Tensor, nn

from espnet_kv.cli import progress
from espnet_kv.encoder.kaldi_fbank import KaldiFbankFrontend
from espnet_kv.errors import UserError
from espnet_kv.streaming.frontend import StreamingFrontend

FLOOR = torch.finfo(torch.float32).eps
"""Lowest energy in Kaldi's features and in those of NeMo, whatever the range of the samples."""
INT16 = 1 << 15
PREEMPHASIS = 0.97
EDGE = 3  # frames at the ends that are not compared: the samples there are reflected differently
MOST_FRAMES = 4000  # of the fit, spread over the recordings
PASSES = 3
MARGIN = 1e-3
"""Values nearer to the floor than this are those of the floor."""


def kaldi_features(samples: Tensor, rate: int, size: int) -> Tensor:
    """(N,) samples between -1 and 1 -> (T, F) Kaldi's log-energies of samples times 32768."""
    frontend = KaldiFbankFrontend(rate, size, rate // 40, rate // 100)
    features, _ = frontend(INT16 * samples[None], torch.tensor([len(samples)]))
    return features[0]


def nemo_features(samples: Tensor, rate: int, size: int) -> Tensor:
    """(N,) samples between -1 and 1 -> (T, F) log-energies in the mel bands of librosa."""
    length, hop = rate // 40, rate // 100
    frames = (len(samples) + hop // 2) // hop
    first = hop // 2 - length // 2
    at = torch.arange(frames)[:, None] * hop + first + torch.arange(length)
    at = torch.where(at < 0, -at - 1, at)
    at = torch.where(at >= len(samples), 2 * len(samples) - 1 - at, at)
    x = samples[at]
    x = x - PREEMPHASIS * torch.cat([x[:, :1], x[:, :-1]], dim=1)
    n_fft = 1 << (length - 1).bit_length()
    power = torch.fft.rfft(x * torch.hann_window(length), n_fft).abs() ** 2
    bands = torchaudio.functional.melscale_fbanks(
        n_fft // 2 + 1, 0.0, rate / 2, size, rate, norm="slaney", mel_scale="slaney"
    )
    return (power @ bands).clamp(min=FLOOR).log()


RUNTIMES = {"kaldi": kaldi_features, "nemo": nemo_features}
"""Features (T, F) of (N,) samples, their rate and F."""


def model_features(frontend: StreamingFrontend, samples: Tensor) -> Tensor:
    """(T, F) features of the model, frame t centred at 10 t + 5 ms, of (N,) samples.

    A recording that the runtime gets is to the model's own frontend as one that begins
    `10 ms / 2 - centre of its first frame` later.

    Raises:
        UserError: the frames of the model are not 10 ms apart.
    """
    if 100 * frontend.hop_length != frontend.sample_rate:
        raise UserError(
            f"frontend_conf.hop_length: {frontend.hop_length}: sherpa-onnx has a frame for every "
            f"10 ms, {frontend.sample_rate / 100:g} samples; give --layout plain"
        )
    later = frontend.hop_length // 2 - (frontend.n_fft // 2 - frontend.borders[0])
    moved = samples[later:] if later > 0 else nn.functional.pad(samples, (-later, 0))
    return frontend(moved, is_final=True)


class FittedFeatures(nn.Module):
    """The model's features of those of the runtime: log(exp(x) W), no number of W negative.

    Args:
        weight: (F, F) W.
    """

    weight: Tensor

    def __init__(self, weight: Tensor):
        super().__init__()
        self.register_buffer("weight", weight)

    def forward(self, x: Tensor) -> Tensor:
        """(..., F) -> (..., F)."""
        return (x.exp() @ self.weight).clamp(min=1e-10).log()


def fit(runtime: Sequence[Tensor], model: Sequence[Tensor], floor: float) -> FittedFeatures:
    """Fit the map on recordings (T, F) each, by non-negative least squares of relative errors.

    An error is relative to the larger one of an energy and its estimate of the pass before, so that
    frames that are nearly silent do not outweigh the others.

    Args:
        floor: values of `runtime` up to this logarithm are not known.
    """
    every = max(1, sum(map(len, runtime)) // MOST_FRAMES)
    a, b = (torch.cat(list(one))[::every].double().exp().numpy() for one in (runtime, model))
    known = a > np.exp(floor + MARGIN)
    columns = []
    with progress("fitting features", b.shape[1]) as counter:
        for band in range(b.shape[1]):
            rows = known[:, band] if known[:, band].sum() > a.shape[1] else slice(None)
            x, y = a[rows], b[rows, band]
            scale = y + 0.01 * y.mean()
            for _ in range(PASSES):
                column, _ = scipy.optimize.nnls(x / scale[:, None], y / scale)
                scale = np.maximum(y, x @ column)
            columns.append(column)
            counter.update()
    return FittedFeatures(torch.from_numpy(np.stack(columns, axis=1)).float())


@dataclass(frozen=True)
class FeatureError:
    """Difference of mapped features and the model's own on recordings outside the fit.

    Attributes:
        nat: mean absolute difference where the runtime's features are above their floor.
        below_floor: share of the others, for which the runtime does not know the energy, in %.
        tokens: error rate in % of the tokens of the best path, that of the own as reference.
    """

    nat: float
    below_floor: float
    tokens: float
