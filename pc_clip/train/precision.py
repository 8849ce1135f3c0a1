"""Which precision a training multiplies in, where that is left to the machine."""

from __future__ import annotations

import logging

import torch

log = logging.getLogger(__name__)

CHOICES = ("no", "bf16", "auto")
CPU_BF16 = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")  # as torch calls what multiplies bf16, x86-64 and Arm


def settle(asked: str, device: torch.device) -> str:
    """What to multiply in, "no" (float32) or "bf16". asked: one of CHOICES.

    A CPU that must take bf16 apart needs several times as long as in float32 (nine times, on a training step of the
    example's captioner on AVX2); where it was asked for by name, that is said and done.
    """
    quick = multiplies_bf16(device)
    if asked == "auto":
        return "bf16" if quick else "no"
    if asked == "bf16" and not quick:
        log.warning(
            "train.precision bf16: this %s has no instructions for it; float32 (no, or auto) is quicker", device
        )
    return asked


def multiplies_bf16(device: torch.device) -> bool:
    """Whether a device has instructions for it."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return any(torch.cpu.get_capabilities().get(name, False) for name in CPU_BF16)
    return False
