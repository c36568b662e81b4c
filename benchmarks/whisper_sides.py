"""ESPnet's Whisper decoder and ours with its weights, for decoding.py."""

import copy
from typing import Any

import torch
from espnet2.asr.decoder.whisper_decoder import OpenAIWhisperDecoder

from espnet_kv.decoder.whisper_decoder import KVWhisperDecoder
from espnet_kv.espnet.openai_whisper import whisper_for_espnet
from espnet_kv.espnet.whisper_weights import load_whisper, sizes_of, weights_follow


def build_decoders(name: str, never: float) -> tuple[Any, Any, Any]:
    """Stock, ours prepared for a search, and ours as trained.

    Args:
        name: a public model, whose sizes are used with random weights, or a file of weights.
        never: the logit of the last token, which stands for <eos>.
    """
    dims = sizes_of(name)
    if dims is not None:
        with weights_follow():
            model = load_whisper(name, None, None)
        with torch.no_grad():
            for parameter in model.decoder.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0, 0.05)
    else:
        model = load_whisper(name, None, None)
    vocabulary, size = model.dims.n_vocab, model.dims.n_text_state
    with weights_follow(), whisper_for_espnet(vars(model.dims)):
        stock = OpenAIWhisperDecoder(vocabulary, size, whisper_model="")
    ours = KVWhisperDecoder(vocabulary, size, whisper_model=None, dims=vars(model.dims))
    decoder = model.decoder
    with torch.no_grad():  # the first number of every hidden state is 1
        decoder.ln.weight[0], decoder.ln.bias[0] = 0, 1
        decoder.token_embedding.weight[-1] = 0
        decoder.token_embedding.weight[-1, 0] = never
    for side in (stock, ours):
        side.decoders.load_state_dict(decoder.state_dict(), strict=True)
    plain = copy.deepcopy(ours)
    ours.prepare_search()
    return stock, ours, plain
