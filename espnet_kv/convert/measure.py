"""Cache size of a model in bytes, measured on the state of a real stream or search.

The input is noise, because the size depends on the length of the input only.
"""

from typing import Any

import torch

from espnet_kv.cache import StateSpec, SumState
from espnet_kv.convert.source import PARTS
from espnet_kv.encoder.streaming import subsampling
from espnet_kv.errors import ConfigError

# encoder frames of the utterance; tokens of the hypothesis
FRAMES, TOKENS = 256, 64
# chunk size in frames if the model's configuration has none
CHUNK = 16


@torch.no_grad()
def cache_bytes(model: Any, part: str) -> dict[str, Any]:
    """Bytes in the attention cache of one part of the model for one utterance.

    encoder: FRAMES frames, streamed in chunks with unlimited left context (left_chunks -1); an
        encoder that cannot stream processes them in one pass.
    decoder_self: one hypothesis of TOKENS tokens.
    decoder_cross: FRAMES encoder frames.

    Args:
        model: the ESPnet model, in eval mode; the encoder or decoder of `part` is a kv_* class.
        part: a key of PARTS.

    Returns:
        {"layers": bytes of each layer, or of the latent that all share, "bytes": their sum,
        "allocated": bytes of the allocated storage, "frames" or "tokens": length of the input,
        "how": method of measurement}.
    """
    if part == "encoder":
        return _of_encoder(model)
    decoder = model.decoder
    attentions = PARTS[part].attentions(model).values()
    generator = torch.Generator().manual_seed(0)
    size = next(iter(attentions)).linear_q.in_features
    encoded = torch.randn(FRAMES, size, generator=generator)
    state = decoder.init_state(encoded)
    tokens = torch.full((TOKENS,), model.sos, dtype=torch.long)
    for length in range(1, TOKENS + 1):
        _, state = decoder.score(tokens[:length], state, encoded)
    if part == "decoder_cross":
        layers = state.search.memory.own_states
        held = [layer.nbytes([FRAMES]) for layer in layers]
        allocated = sum(layer.capacity_bytes for layer in layers)
        return _result(held, allocated, {"frames": FRAMES}, "a search")
    held = [
        state.sums[n].nbytes if isinstance(layer, SumState) else layer.nbytes(state.search.held)
        for n, layer in enumerate(state.search.states)
    ]
    allocated = state.search.capacity_by_kind()["self"]
    return _result(held, allocated, {"tokens": TOKENS}, "a search")


def _of_encoder(model: Any) -> dict[str, Any]:
    encoder = model.encoder
    attentions = PARTS["encoder"].attentions(model).values()
    generator = torch.Generator().manual_seed(0)
    try:
        if not hasattr(encoder, "init_state"):
            raise ConfigError("Whisper's encoder attends to the whole utterance")
        state = encoder.init_state(chunk_size=encoder.chunk_size or CHUNK, left_chunks=-1)
    except ConfigError as error:
        weight = next(encoder.parameters())
        spec = StateSpec(1, FRAMES, None, weight.dtype, weight.device)
        xs = torch.randn(1, FRAMES, encoder.output_size(), generator=generator)
        states = [attention.init_cross_state(xs, spec, None) for attention in attentions]
        held = [state.nbytes([FRAMES]) for state in states]
        allocated = sum(state.capacity_bytes for state in states)
        how = f"one pass over all frames, as the encoder cannot stream ({error})"
        return _result(held, allocated, {"frames": FRAMES}, how)
    stride, window = subsampling(encoder.embed)
    features = (FRAMES - 1) * stride + window
    xs = torch.randn(1, features, state.features.size, generator=generator)
    encoder.forward_chunk(xs, state, is_final=True)
    held = [state.modules[attention.state_index].nbytes for attention in attentions]
    allocated = state.capacity_by_kind()["attention"]
    return _result(held, allocated, {"frames": FRAMES}, "a stream")


def _result(held: list[int], allocated: int, of: dict[str, int], how: str) -> dict[str, Any]:
    return {"layers": held, "bytes": sum(held), "allocated": allocated, **of, "how": how}
