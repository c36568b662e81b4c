"""All steps of the recipe and their dependencies."""

from collections.abc import Sequence
from pathlib import Path

from espnet_kv.recipe import (
    conversion,
    data,
    decode,
    exporting,
    lm,
    packing,
    profiling,
    scoring,
    train,
    whisper_models,
)
from espnet_kv.recipe.layout import Layout
from espnet_kv.recipe.steps import Step


def plan(layout: Layout) -> list[Step]:
    """The steps of stages 1 to 18 for the options; dependencies come first."""
    args = layout.args
    whisper_models.check(layout)
    prepare = data.prepare_step(layout)
    perturb = data.perturb_step(layout, prepare)
    formatted = {
        name: data.format_step(
            layout, name, perturb if layout.perturbed and name == layout.train_set else prepare
        )
        for name in dict.fromkeys([layout.train_set, args.valid_set, *args.test_sets])
    }
    lengths = [
        data.lengths_step(layout, name, formatted[name])
        for name in dict.fromkeys([layout.train_set, args.valid_set])
    ]
    tokens = data.tokens_step(layout, prepare)
    text = [*lengths, tokens]
    lm_stats = lm.lm_stats_step(layout, text)
    lm_trained = lm.train_lm_step(layout, [*text, lm_stats])
    perplexities = [
        lm.perplexity_step(layout, name, lm_trained, formatted[name]) for name in args.test_sets
    ]
    ngram = lm.ngram_step(layout, [lengths[0], tokens])
    language_models = [*([lm_trained] if args.use_lm else []), *([ngram] if args.use_ngram else [])]

    models = _models(layout, lengths, tokens)
    made = [step for steps in models.values() for step in steps]
    last = {
        config: [step for step in made if step.output == layout.asr_exp(config)]
        for config in args.asr_config
    }
    decoded = {
        (config, name): decode.decode_step(
            layout, config, name, [formatted[name], *last[config], *language_models]
        )
        for config in args.asr_config
        for name in args.test_sets
    }
    scored = {
        (layout.asr_exp(config), name): scoring.score_step(layout, config, name, step)
        for (config, name), step in decoded.items()
    }
    results = [scoring.results_step(layout, scored)]
    if args.convert_from is not None:
        results += [
            conversion.report_step(layout, converted, list(scored.values()))
            for converted in conversion.plan(args)
        ]
    profiles, rates, exports = [], [], []
    for config in args.asr_config:
        before = [formatted[args.test_sets[0]], *last[config]]
        profiles.append(profiling.profile_step(layout, config, before))
        rates.append(profiling.rates_step(layout, config, profiles[-1]))
        exports.append(exporting.export_step(layout, config, before))
    packs = {config: packing.pack_step(layout, config, last[config]) for config in args.asr_config}
    return [
        prepare,
        perturb,
        *formatted.values(),
        *lengths,
        tokens,
        lm_stats,
        lm_trained,
        *perplexities,
        ngram,
        *models[10],
        *models[11],
        *decoded.values(),
        *scored.values(),
        *results,
        *profiles,
        *rates,
        profiling.compare_step(layout, []),
        *packs.values(),
        *(packing.upload_step(layout, config, step) for config, step in packs.items()),
        *exports,
    ]


def _models(layout: Layout, lengths: Sequence[Step], tokens: Step) -> dict[int, list[Step]]:
    """The steps of stages 10 and 11: statistics and trainings, or conversions."""
    args = layout.args
    if args.convert_from is None:
        text = [*lengths, tokens]
        stats: dict[Path, Step] = {}
        trainings = []
        for config in args.asr_config:
            if not layout.trains(config):
                trainings.append(train.train_step(layout, config, [tokens]))
                continue
            out = layout.stats(config)
            if out not in stats:
                stats[out] = train.stats_step(layout, config, text)
            trainings.append(train.train_step(layout, config, [*text, stats[out]]))
        return {10: list(stats.values()), 11: trainings}

    steps = []
    for converted in conversion.plan(args):
        converting = conversion.convert_step(layout, converted, lengths[:1])
        steps.append(converting)
        if converted.fine_tuned is not None:
            start, end = converted.experiment, converted.fine_tuned
            steps.append(conversion.fine_tuning_step(layout, start, end, [converting]))
    if (control := conversion.control(args)) is not None:
        steps.append(conversion.fine_tuning_step(layout, args.convert_from, control, []))
    return {10: [_statistics_of_source(layout)], 11: steps}


def _statistics_of_source(layout: Layout) -> Step:
    return Step(
        stage=10,
        name="statistics",
        output=layout.args.expdir,
        build=lambda: None,
        skipped=f"those of {layout.args.convert_from} are used",
    )
