"""The encoder kv_whisper."""

from collections.abc import Mapping
from typing import Any

from espnet2.asr.encoder.whisper_encoder import OpenAIWhisperEncoder
from torch import Tensor

from espnet_kv.attention import check_attention, layer_confs
from espnet_kv.attention.whisper import replace_whisper_attention
from espnet_kv.errors import ConfigError
from espnet_kv.espnet.loading import refuse_partial_loads
from espnet_kv.espnet.openai_whisper import (
    SAMPLE_RATE,
    replace_norms,
    too_long,
    whisper_for_espnet,
)


class KVWhisperEncoder(OpenAIWhisperEncoder):
    """ESPnet's OpenAIWhisperEncoder (arXiv 2212.04356) with a choice of attention.

    With attention_type mha, parameters and output are ESPnet's. Audio longer than 30 s is refused,
    while ESPnet drops its end. It encodes whole utterances and cannot stream.

    Args:
        input_size: not used; the input is audio of 16 kHz.
        dropout_rate, use_specaug, specaug_conf: as ESPnet's.
        whisper_model, download_dir, dims: see `espnet_kv.espnet.whisper_weights.load_whisper`.
        do_pad_trim: pad audio to 30 s, as in the training of Whisper.
        attention_type: mha, gqa, mla or linear.
        attention_conf: options of the attention; a list holds one value per block.

    Attributes:
        dims: the dimensions of the Whisper model.

    Raises:
        ConfigError (a ValueError): names the key, its value and the allowed values.
        UserError: openai-whisper is not installed, or the weights cannot be read.
    """

    def __init__(
        self,
        input_size: int = 1,
        dropout_rate: float = 0.0,
        whisper_model: str | None = "small",
        download_dir: str | None = None,
        use_specaug: bool = False,
        specaug_conf: dict | None = None,
        do_pad_trim: bool = False,
        dims: Mapping[str, int] | None = None,
        attention_type: str = "mha",
        attention_conf: Mapping[str, Any] | None = None,
    ):
        attention_conf = dict(attention_conf or {})
        check_attention(attention_type, attention_conf)
        if attention_conf.get("decay") is not None:
            raise ConfigError("attention_conf.decay: works with chunks, which kv_whisper has not")
        with whisper_for_espnet(dims) as loaded:
            super().__init__(
                input_size,
                dropout_rate,
                whisper_model or "",
                download_dir,
                use_specaug,
                specaug_conf or {},
                do_pad_trim,
            )
        self.dims = loaded[-1]
        replace_norms(self)
        self.n_mels = self.dims["n_mels"]
        confs = layer_confs(attention_conf, len(self.encoders.blocks))
        for index, (block, conf) in enumerate(zip(self.encoders.blocks, confs, strict=True)):
            attention = replace_whisper_attention(block, "attn", attention_type, conf)
            attention.state_index = index
        # ESPnet loads with strict=False and would keep random attention weights
        self.load_guard = refuse_partial_loads(self)

    def forward(
        self, xs_pad: Tensor, ilens: Tensor, prev_states: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """ESPnet's forward.

        Args:
            xs_pad: (B, N) samples. ilens: (B,).

        Returns:
            (B, T, D), (B,), None.

        Raises:
            UserError: an utterance is longer than 30 s.
        """
        longest = int(ilens.max())
        most = 2 * self.dims["n_audio_ctx"]  # mel frames: the second convolution halves them
        if longest // self.hop_length > most:
            raise too_long(longest / SAMPLE_RATE, most * self.hop_length / SAMPLE_RATE)
        return super().forward(xs_pad, ilens, prev_states)

    def log_mel_spectrogram(
        self, audio: Tensor, ilens: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """ESPnet's, in float32; a model of 16 bits goes on in its own type."""
        features, lengths = super().log_mel_spectrogram(audio.float(), ilens)
        return features.to(self.encoders.conv1.weight.dtype), lengths
