"""Optimizers, half precision and learning-rate schedules."""

from __future__ import annotations

from fairseq.optim.build import build_optimizer
from fairseq.optim.dynamic_loss_scaler import DynamicLossScaler
from fairseq.optim.ema import EMA, build_ema
from fairseq.optim.fairseq_optimizer import FairseqOptimizer, LegacyFairseqOptimizer
from fairseq.optim.fp16_optimizer import FP16Optimizer, MemoryEfficientFP16Optimizer
from fairseq.registry import OPTIMIZERS

__all__ = [
    "EMA",
    "OPTIMIZER_REGISTRY",
    "DynamicLossScaler",
    "FP16Optimizer",
    "FairseqOptimizer",
    "LegacyFairseqOptimizer",
    "MemoryEfficientFP16Optimizer",
    "build_ema",
    "build_optimizer",
    "register_optimizer",
]

OPTIMIZER_REGISTRY = OPTIMIZERS
register_optimizer = OPTIMIZERS.register
