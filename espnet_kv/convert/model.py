"""Converting a loaded model: which attention becomes what, and how far off it then is."""

import argparse
import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from espnet_kv.convert.calibration import Calibration, Listener
from espnet_kv.convert.calls import Call, recording
from espnet_kv.convert.effects import measure_effects
from espnet_kv.convert.factorize import to_mla
from espnet_kv.convert.layer_error import layer_errors
from espnet_kv.convert.linalg import symmetric_root
from espnet_kv.convert.measure import cache_bytes
from espnet_kv.convert.pooling import to_gqa
from espnet_kv.convert.source import PARTS
from espnet_kv.convert.statistics import LayerStatistics
from espnet_kv.convert.target import Target, layer_options
from espnet_kv.convert.transfer import to_linear, transfer
from espnet_kv.errors import ArgumentError, UserError
from espnet_kv.espnet.loading import build_filled
from espnet_kv.espnet.task import ASRTask

# attention transfer: utterances that a step learns from
UTTERANCES = 4
# how much layers matter: utterances that it is measured on
UTTERANCES_OF_EFFECTS = 16

type Tell = Callable[[str, int], Callable[[], object]]
"""tell("label", total) -> what to call after each of `total` steps."""


@dataclass
class Layer:
    """One converted attention.

    conf: its options. spectrum: singular values of [W_k; W_v] as the calibration audio meets
    them, the largest first, in parts of the root of their sum of squares. errors: of k, v and
    output, relative, on audio that was not fitted to; None without audio.
    """

    part: str
    name: str
    conf: dict[str, Any]
    spectrum: list[float]
    errors: dict[str, float] | None = None


@dataclass
class Conversion:
    """A converted model.

    config: its configuration. cache: part -> {"before": ..., "after": ...} of `cache_bytes`.
    """

    model: Any
    config: dict[str, Any]
    layers: list[Layer] = field(default_factory=list)
    cache: dict[str, dict[str, Any]] = field(default_factory=dict)
    parameters: dict[str, int] = field(default_factory=dict)


def convert_model(
    model: Any,
    config: Mapping[str, Any],
    parts: Sequence[str],
    target: Target,
    calibration: Calibration | None,
    tell: Tell,
) -> Conversion:
    """Convert the attention of some parts of a model; all else stays as it is.

    Args:
        model, config: from `load_source`. Its attention modules are replaced in place.
        parts: keys of PARTS.
        calibration: what to fit to; None: to the weights alone.
        tell: shows progress.

    Raises:
        UserError: a layer cannot be converted in this way.
    """
    if target.attention_type == "linear" and calibration is None:
        raise ArgumentError("attention_type", "linear learns from audio: give calibration_scp")
    parameters = {"before": _count(model)}
    cache = {part: {"before": cache_bytes(model, part)} for part in parts}
    names = {part: PARTS[part].attentions(model) for part in parts}
    sources = {name: a for attentions in names.values() for name, a in attentions.items()}
    seen: dict[str, list[Call]] = {}
    unseen: dict[str, list[Call]] = {}
    listener = None
    if calibration is not None:
        listener = Listener(model, decoding=any(PARTS[p].module == "decoder" for p in parts))
        heard = [*calibration.fit, *calibration.held_out]
        listener.learn_words(heard, tell("words that the decoder finds", len(heard)))
        step = tell("calibration", len(heard))
        for calls, audio in ((seen, calibration.fit), (unseen, calibration.held_out)):
            with recording(sources) as recorded:
                listener.hear(audio, step)
            calls.update(recorded)
    step = tell("statistics", len(sources))
    statistics: dict[str, LayerStatistics] = {}
    for name, calls_of in seen.items():
        statistics[name] = LayerStatistics.of(sources[name], calls_of)
        step()

    layers = []
    new_config = copy.deepcopy(dict(config))
    converted: dict[str, Any] = {}
    for part, attentions in names.items():
        effects = None
        if listener is not None and target.shares_a_budget:
            effects = _effects(part, attentions, listener, calibration, tell)
        confs = layer_options(target, attentions, statistics, effects)
        step = tell(f"{part} to {target.attention_type}", len(attentions))
        for name, attention in attentions.items():
            converted[name] = _convert_layer(
                name, attention, target, confs[name], statistics.get(name)
            )
            spectrum = _spectrum(attention, statistics.get(name))
            layers.append(Layer(part, name, confs[name], spectrum))
            step()
        _set_options(new_config, part, model, target.attention_type, confs)
    if target.attention_type == "linear":
        assert calibration is not None and listener is not None
        _teach(sources, converted, target, calibration.fit, listener, tell)
    if unseen:
        step = tell("errors on audio held out", len(layers))
        for layer in layers:
            name = layer.name
            layer.errors = layer_errors(sources[name], converted[name], unseen[name])
            step()

    for part in parts:
        for name, block, slot in PARTS[part].slots(model):
            setattr(block, slot, converted[name])
    # the configuration must describe the weights, and nothing of them may be lost
    args = argparse.Namespace(**copy.deepcopy(new_config))
    rebuilt: Any = build_filled(
        ASRTask.build_model, args, model.state_dict(), "the configuration of the converted model"
    )
    rebuilt.load_state_dict(model.state_dict())
    rebuilt.eval()
    for part in parts:
        cache[part]["after"] = cache_bytes(rebuilt, part)
    parameters["after"] = _count(rebuilt)
    return Conversion(rebuilt, new_config, layers, cache, parameters)


def _count(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _effects(
    part: str, attentions: Mapping[str, Any], listener: Listener, calibration: Any, tell: Tell
) -> dict[str, float]:
    """How much an error of each layer changes what the encoder, or the decoder, puts out."""
    audio = calibration.fit[:UTTERANCES_OF_EFFECTS]
    step = tell(f"{part}: what each layer matters", 1 + len(attentions))

    def run() -> Tensor:
        heard = listener.hear(audio)[PARTS[part].module]
        step()
        return heard

    return measure_effects(attentions, run)


def _convert_layer(
    name: str,
    attention: Any,
    target: Target,
    conf: dict[str, Any],
    statistics: LayerStatistics | None,
) -> Any:
    try:
        if target.attention_type == "mla":
            return to_mla(attention, conf["kv_rank"], statistics)
        if target.attention_type == "gqa":
            return to_gqa(attention, conf["num_kv_heads"], statistics)
        return to_linear(attention, conf["feature_map"])
    except UserError as error:
        raise UserError(f"{name}: {error}") from error


def _spectrum(attention: Any, statistics: LayerStatistics | None) -> list[float]:
    stacked = torch.cat([attention.linear_k.weight, attention.linear_v.weight]).detach().double()
    if statistics is not None:
        stacked = stacked @ symmetric_root(statistics.covariance)
    values = torch.linalg.svdvals(stacked)
    return (values / values.norm().clamp(min=1e-300)).tolist()


def _set_options(
    config: dict[str, Any], part: str, model: Any, kind: str, confs: Mapping[str, dict[str, Any]]
) -> None:
    """Write attention_type and attention_conf of a part: one value where all layers agree."""
    where = PARTS[part]
    module = getattr(model, where.module)
    blocks = module.encoders if where.module == "encoder" else module.decoders
    of_block = {id(block): confs[name] for name, block, _ in where.slots(model)}
    least: dict[str, Any] = next(iter(confs.values()))
    rows = [of_block.get(id(block), least) for block in blocks]  # a block without attention: any
    options: dict[str, Any] = {}
    for key in least:
        values = [row[key] for row in rows]
        options[key] = values[0] if len(set(values)) == 1 else values
    conf = dict(config.get(f"{where.module}_conf") or {})
    conf |= {where.type_key: kind, where.conf_key: options}
    config[f"{where.module}_conf"] = conf


def _teach(
    teachers: Mapping[str, Any],
    students: Mapping[str, Any],
    target: Target,
    audio: Sequence[Tensor],
    listener: Listener,
    tell: Tell,
) -> None:
    """Attention transfer, over the audio again and again."""
    step = tell("attention transfer", target.transfer_steps)
    turn = 0

    def run() -> None:
        nonlocal turn
        listener.hear([audio[(turn + n) % len(audio)] for n in range(UTTERANCES)])
        turn += UTTERANCES

    learns = any(True for student in students.values() for _ in student.feature_map.parameters())
    transfer(
        teachers,
        students,
        run,
        target.transfer_steps,
        projections=not learns,
        progress=lambda *_: step(),
    )
