"""Converting a loaded model: which attention becomes what, and how far off it then is."""

import argparse
import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from espnet_kv.attention import ATTENTIONS
from espnet_kv.convert.budget import choose_ranks
from espnet_kv.convert.calibration import Calibration, Listener
from espnet_kv.convert.calls import Call, recording
from espnet_kv.convert.effects import measure_effects
from espnet_kv.convert.errors import layer_errors
from espnet_kv.convert.factorize import to_mla
from espnet_kv.convert.linalg import symmetric_root
from espnet_kv.convert.measure import cache_bytes
from espnet_kv.convert.pooling import to_gqa
from espnet_kv.convert.source import PARTS
from espnet_kv.convert.statistics import LayerStatistics
from espnet_kv.convert.transfer import to_linear, transfer
from espnet_kv.errors import UserError
from espnet_kv.task import ASRTask

# attention transfer: utterances that a step learns from
UTTERANCES = 4
# how much layers matter: utterances that it is measured on
UTTERANCES_OF_EFFECTS = 16

type Tell = Callable[[str, int], Callable[[], object]]
"""tell("label", total) -> what to call after each of `total` steps."""


@dataclass(frozen=True)
class Target:
    """What attention becomes.

    Args:
        attention_type: mla, gqa or linear.
        kv_rank, num_kv_heads, feature_map: of mla, gqa, linear.
        target_compression: in place of kv_rank or num_kv_heads, the fraction of the attention
            cache's bytes that goes, in (0, 1).
        transfer_steps: of linear: steps of attention transfer.

    Raises:
        UserError: options that do not go together, or too few.
    """

    attention_type: str
    kv_rank: int | None = None
    num_kv_heads: int | None = None
    feature_map: str | None = None
    target_compression: float | None = None
    transfer_steps: int = 300

    def __post_init__(self) -> None:
        kind, options = self.attention_type, ATTENTIONS[self.attention_type].options
        for name in ("kv_rank", "num_kv_heads", "feature_map"):
            if getattr(self, name) is not None and name not in options:
                raise UserError(f"--{name}: --attention_type {kind} does not take it")
        fraction = self.target_compression
        if kind == "linear":
            if fraction is not None:
                raise UserError(
                    "--target_compression: the state of linear attention is constant; leave it out"
                )
            return
        size = "kv_rank" if kind == "mla" else "num_kv_heads"
        if (fraction is None) == (getattr(self, size) is None):
            raise UserError(
                f"--attention_type {kind}: give either --{size} or --target_compression"
            )
        if fraction is not None and not 0 < fraction < 1:
            raise UserError(
                f"--target_compression {fraction}: the part of the cache that goes, allowed is "
                "more than 0 and less than 1"
            )

    @property
    def shares_a_budget(self) -> bool:
        """Whether layers get ranks of their own."""
        return self.attention_type == "mla" and self.target_compression is not None


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


def convert(
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
        raise UserError("--attention_type linear learns from audio: give --calibration_scp")
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
        confs = _layer_confs(target, attentions, statistics, effects)
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
    rebuilt: Any = ASRTask.build_model(argparse.Namespace(**copy.deepcopy(new_config)))
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


def _layer_confs(
    target: Target,
    attentions: Mapping[str, Any],
    statistics: Mapping[str, LayerStatistics],
    effects: Mapping[str, float] | None,
) -> dict[str, dict[str, Any]]:
    """attention_conf of each layer of a part."""
    if target.attention_type == "linear":
        return {name: {"feature_map": target.feature_map or "hedgehog"} for name in attentions}
    first = next(iter(attentions.values()))
    if target.attention_type == "gqa":
        heads = target.num_kv_heads
        if heads is None:
            heads = _heads_left(first.h, target.target_compression or 0.0)
        return {name: {"num_kv_heads": heads} for name in attentions}
    if target.kv_rank is not None:
        return {name: {"kv_rank": target.kv_rank} for name in attentions}
    numbers = [2 * a.h * a.d_k for a in attentions.values()]
    budget = round((1 - (target.target_compression or 0.0)) * sum(numbers))
    if not statistics:
        rank = budget // len(numbers)
        if rank < 1:
            raise UserError(f"--target_compression {target.target_compression}: no rank is left")
        return {name: {"kv_rank": rank} for name in attentions}
    layers = {name: (attention, statistics[name]) for name, attention in attentions.items()}
    ranks = choose_ranks(layers, budget, effects)
    return {name: {"kv_rank": ranks[name]} for name in attentions}


def _heads_left(heads: int, fraction: float) -> int:
    allowed = {1 - g / heads: g for g in range(1, heads) if heads % g == 0}
    for removed, left in allowed.items():
        if abs(removed - fraction) < 1e-6:
            return left
    listed = ", ".join(f"{removed:g}" for removed in sorted(allowed)) or "none"
    raise UserError(
        f"--target_compression {fraction}: {heads} heads cannot share like that (allowed: {listed})"
    )


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
