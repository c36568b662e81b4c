"""What is counted rather than timed: parameters and multiply-accumulates."""

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from espnet_kv.profile.sound import Sound, features, pieces
from espnet_kv.profile.subject import Subject


def parameters(model: torch.nn.Module) -> dict[str, int]:
    """{"parameters", "parameter_bytes"}; what is shared counts once."""
    own = list(model.parameters())
    return {
        "parameters": sum(p.numel() for p in own),
        "parameter_bytes": sum(p.nbytes for p in own),
    }


def macs_per_second(subject: Subject, sound: Sound) -> float:
    """Multiply-accumulates of the streamed encoder for a second of audio, left context full.

    Matrix products and convolutions, as torch's FlopCounterMode counts them while a chunk runs.
    """
    before = max(0, subject.left_chunks) + 2
    xs = features(subject, sound.clip((before + 2) * subject.chunk_seconds))
    encoder, state = subject.encoder, subject.init_state()
    for number, x in enumerate(pieces(xs, subject.chunk_size * subject.stride)):
        if number == before:
            # FlopCounterMode does not count the fused kernel of the CPU
            with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
                encoder.forward_chunk(x, state)
            return counter.get_total_flops() / 2 / subject.chunk_seconds
        encoder.forward_chunk(x, state)
    raise AssertionError("the clip is long enough for the chunk")
