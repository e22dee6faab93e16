"""What a run of generator training says of itself: its manifest, and its generator's provenance."""

from typing import Any

from loragen.core.generator.training.data import GeneratorData
from loragen.core.generator.training.optimization import StepPlan
from loragen.core.generator.training.plan import Plan
from loragen.core.generator.training.resume import GeneratorPoint
from loragen.core.generator.training.selection import Selection
from loragen.core.lora.precision import dtype_name
from loragen.core.manifests import GeneratorManifest, SourceRecord, plugin_records
from loragen.core.protocols import Encoder


def new_manifest(
    work: Plan, data: GeneratorData, encoder: Encoder, resume: GeneratorPoint | None
) -> GeneratorManifest:
    """Of a run that begins, or goes on with what `resume` has of it."""
    config, base = data.config, data.rehearsal.base if data.rehearsal else None
    chosen = {
        "encoder": [config.encoder.name],
        "decoder": [config.decoder.name],
        "schedule": [config.schedule.name],
        "logger": list(config.loggers),
    }
    manifest = GeneratorManifest(
        base_model=work.base_model,
        sources=[str(s.checkpoints[0].parent.absolute()) for s in work.sources],
        val_sources=[str(s.checkpoints[0].parent.absolute()) for s in work.unseen],
        base_fingerprint=base.fingerprint if base else "",
        base_dtype=dtype_name(base.model.dtype) if base else "",
        source_records=_source_records(data),
        encoder_fingerprint=encoder.fingerprint,
        plugins=plugin_records(chosen),
    )
    if resume:
        manifest.started = resume.manifest.started
        manifest.resumed_from = [*resume.manifest.resumed_from, resume.step]
    return manifest


def provenance(
    manifest: GeneratorManifest, selection: Selection, steps: StepPlan
) -> dict[str, Any]:
    """What the generator's file tells of its training."""
    known = manifest.model_dump(mode="json", exclude={"status", "seconds", "logger_run_ids"})
    return {**known, "trained_for": str(steps.phases), "chosen_by": selection.sentence}


def _source_records(data: GeneratorData) -> list[SourceRecord]:
    tried = data.rehearsal
    known = [*tried.rows, *tried.unseen] if tried else [None] * len(data.both)
    return [
        source.record.model_copy(
            update={"held_out": place >= len(data.sources), "labels": rows.sha256 if rows else ""}
        )
        for place, (source, rows) in enumerate(zip(data.both, known, strict=True))
        if source.record
    ]
