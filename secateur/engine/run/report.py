"""The report of one target."""

from secateur.catalog.resolve import Resolved
from secateur.catalog.sources import ModelSource
from secateur.contract.report import (
    Change,
    CountChange,
    LatencyChange,
    LayerWidths,
    ParameterChange,
    RatioSummary,
    Report,
    Source,
    Step,
    VocabularyChange,
    WidthChange,
)
from secateur.engine.evaluation import compare_benchmarks, compare_generations
from secateur.engine.export import versions
from secateur.engine.measure.texts import Windows
from secateur.engine.model.decoder import Decoder
from secateur.engine.model.plan import widths_of
from secateur.engine.run.state import RunState, TargetState


def build_report(
    decoder: Decoder,
    source: ModelSource,
    resolved: Resolved,
    state: RunState,
    target: TargetState,
    calibration: Windows,
    evaluation: Windows,
) -> Report:
    """Build the report of ``target``, whose steps are complete; ``decoder`` is the pruned model."""
    shape, baseline, last = decoder.shape, state.baseline, target.steps[-1]
    assert baseline.benchmarks is not None and last.benchmarks is not None, "both were measured by the whole suite"
    assert baseline.parameters and last.parameters and baseline.flops and last.flops and last.widths is not None
    assert baseline.prunable_parameters is not None and last.prunable_parameters is not None
    benchmarks, retained = compare_benchmarks(baseline.benchmarks, last.benchmarks)
    widths = WidthChange(before=widths_of(shape.layers), after=last.widths)
    return Report(
        source=Source(
            model_id=source.name,
            revision=source.revision,
            gguf_file=source.gguf_file,
            fingerprint=source.fingerprint(),
            family=shape.family.name,
            model_type=shape.model_type,
        ),
        spec=resolved.spec.published(),
        components=resolved.components.names,
        rounds=resolved.components.rounds,
        ratio=RatioSummary(
            target=target.ratio,
            reached=decoder.reached_ratio,
            of_all_parameters=1 - last.parameters / baseline.parameters,
            of_flops=1 - last.flops / baseline.flops,
        ),
        redundancy_removed=1 - _units(widths.after) / _units(widths.before),
        benchmarks=benchmarks,
        retained_accuracy=retained,
        generations=compare_generations(baseline.generations or [], last.generations or []),
        parameters=ParameterChange(
            before=baseline.parameters,
            after=last.parameters,
            prunable_before=baseline.prunable_parameters,
            prunable_after=last.prunable_parameters,
        ),
        perplexity=Change(before=baseline.perplexity, after=last.perplexity),
        nats_per_byte=None
        if state.vocabulary is None
        else Change(before=baseline.nats_per_byte, after=last.nats_per_byte),
        vocabulary=_vocabulary(decoder, state),
        flops=CountChange(before=baseline.flops, after=last.flops),
        weights_bytes=CountChange(before=baseline.weights_bytes, after=last.weights_bytes),
        latency=LatencyChange(before=baseline.latency, after=last.latency),
        peak_memory_bytes=CountChange(before=_peak_memory(baseline), after=_peak_memory(last)),
        widths=widths,
        steps=list(target.steps),
        calibration=calibration.describe(),
        evaluation=evaluation.describe(),
        dtype=str(decoder.model.dtype).removeprefix("torch."),
        device=str(decoder.placement),
        seed=resolved.spec.seed,
        versions=versions(),
    )


def _vocabulary(decoder: Decoder, state: RunState) -> VocabularyChange | None:
    if state.vocabulary is None or decoder.vocabulary is None:
        return None
    cut = decoder.vocabulary
    return VocabularyChange(
        before=cut.vocabulary.rows,
        after=cut.vocabulary.size,
        growth=state.vocabulary.growth,
        bytes_before=cut.tables.before,
        bytes_after=cut.tables.after,
    )


def _units(widths: list[LayerWidths]) -> int:
    """Return the number of KV groups and channels of all layers; the channels of every expert count."""
    return sum(layer.kv_groups + layer.channels * layer.experts for layer in widths)


def _peak_memory(step: Step) -> int | None:
    return None if step.latency is None else step.latency.peak_memory_bytes
