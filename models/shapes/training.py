"""What every training stage shares: device, schedule, averaged weights, log and resumable state."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

SEED = 7
"""Of everything that is drawn in training."""


def device() -> torch.device:
    """A GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def autocast() -> torch.autocast:
    """bf16 matrix products; weights, sums and losses stay in float32."""
    return torch.autocast(device().type, torch.bfloat16)


def generator(*seed: int) -> np.random.Generator:
    """A NumPy stream that depends on stage, seed and step alone, so that a resumed run repeats itself."""
    return np.random.default_rng(seed)


@dataclass(frozen=True)
class Plan:
    """How a stage trains: constant learning rate after a warm-up, falling to zero over the last part."""

    steps: int
    learning_rate: float
    warmup: int = 100
    cooldown: float = 0.3
    decay: float = 0.999
    weight_decay: float = 0.01

    def rate(self, step: int) -> float:
        """Learning rate of a step (counted from 0)."""
        left = (self.steps - step) / max(1.0, self.cooldown * self.steps)
        return self.learning_rate * min(1.0, (step + 1) / self.warmup, left)


class Stage:
    """One resumable training stage: optimizer, averaged copy of the weights, log lines, state on disk.

    `folder/state.pt` is written to a temporary name and renamed, so a killed run loses at most `every` steps.
    """

    def __init__(self, folder: Path, model: torch.nn.Module, plan: Plan, every: int = 250) -> None:
        self.folder, self.model, self.plan, self.every = folder, model, plan, every
        folder.mkdir(parents=True, exist_ok=True)
        self.optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=plan.learning_rate,
            weight_decay=plan.weight_decay,
            betas=(0.9, 0.99),
            fused=True,
        )
        self.average = {name: value.detach().clone() for name, value in model.state_dict().items()}
        self.step = 0
        state = folder / "state.pt"
        if state.exists():
            saved = torch.load(state, map_location=device(), weights_only=True)
            model.load_state_dict(saved["model"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.average, self.step = saved["average"], saved["step"]

    def train(self, loss_of: Callable[[int], torch.Tensor], until: int | None = None) -> None:
        """Run to step `until` (None: the plan's end); `loss_of(step)` gives the loss of a fresh batch."""
        started, first = time.perf_counter(), self.step
        losses: list[float] = []
        end = min(self.plan.steps, until if until is not None else self.plan.steps)
        while self.step < end:
            for group in self.optimizer.param_groups:
                group["lr"] = self.plan.rate(self.step)
            loss = loss_of(self.step)
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.step += 1
            self._follow()
            losses.append(loss.item())
            if self.step % 50 == 0 or self.step == end:
                seconds = (time.perf_counter() - started) / (self.step - first)
                mean = sum(losses) / len(losses)
                self._log(step=self.step, loss=round(mean, 5), seconds_per_step=round(seconds, 4))
                losses.clear()
            if self.step % self.every == 0 or self.step == end:
                self.save()

    def _follow(self) -> None:
        decay = min(self.plan.decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for name, value in self.model.state_dict().items():
                if value.dtype.is_floating_point:
                    self.average[name].lerp_(value, 1 - decay)

    def _log(self, **values: float) -> None:
        with (self.folder / "log.jsonl").open("a") as log:
            log.write(json.dumps(values) + "\n")

    def save(self) -> None:
        """Write the state so that the stage can go on from this step."""
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average,
            "step": self.step,
        }
        partial = self.folder / "state.partial"
        torch.save(state, partial)
        os.replace(partial, self.folder / "state.pt")

    def finish(self) -> None:
        """Put the averaged weights into the model."""
        self.model.load_state_dict(self.average)
        self.model.eval()


def batches(count: int, size: int) -> Iterator[slice]:
    """Slices of at most `size` that cover `count` rows."""
    for start in range(0, count, size):
        yield slice(start, min(count, start + size))


def psnr(a: torch.Tensor, b: torch.Tensor, span: float = 2.0) -> float:
    """Peak signal-to-noise ratio in dB of two tensors whose values span `span`."""
    return 10 * math.log10(span**2 / max(1e-12, (a.float() - b.float()).square().mean().item()))
