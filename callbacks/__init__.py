"""What acts on a trainer; public names are imported when first used."""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach(
    __name__,
    submod_attrs={
        "bn_recalibration": ["BatchNormRecalibration"],
        "bucket_use": ["BucketUse"],
        "checkpoint": ["RunCheckpoint"],
        "checkpoint_io": ["AtomicCheckpointIO"],
        "excp.checkpoint_io": ["ExCPCheckpointIO"],
        "excp.metrics": ["ExCPMetrics"],
        "excp.strategies": ["ExCPFSDPStrategy", "ExCPModelParallelStrategy"],
        "generation_preview": ["GenerationPreview"],
        "graceful_interrupt": ["GracefulInterrupt"],
        "plain_progress": ["PlainProgress"],
        "slab_schedule": ["PRepBNSchedule"],
        "step_seed": ["StepSeed"],
        "throughput": ["TokenThroughput"],
        "weight_ema": ["WeightEMA"],
    },
)
