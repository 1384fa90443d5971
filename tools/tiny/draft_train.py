"""Trains the draft by distillation: at each place, the backbone's distribution of the token after the next one."""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tiny.batches import ANSWER, PROMPT
from tiny.draft import Places, Weights, draft_hidden, straight_through
from tiny.network import FIELDS
from tiny.streams import Streams

PATTERN = (
    *("tools", "request", "short", "tools", "middle", "many tools", "brief", "request"),
    *("tools", "long", "short", "tools", "request", "many tools", "middle", "short"),
)
NUM_ROWS = {"brief": 512, "short": 256, "request": 96, "middle": 64, "long": 24, "tools": 24, "many tools": 16}
_SELECTS = "ffn.gate.bias"


@dataclass(frozen=True)
class DraftRecipe:
    """Settings of a run. Those that ``Recipe`` has too mean the same.

    seconds: train for so long, instead of ``num_steps``.
    """

    seed: int = 20261130
    num_steps: int = 4000
    seconds: float | None = None
    num_warmup_steps: int = 50
    row_share: float = 1.0
    learning_rate: float = 1.5e-3
    final_learning_rate: float = 2e-5
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.98)
    max_grad_norm: float = 1.0
    prompt_weight: float = 0.03
    balance_step: float = 1e-3
    quantised_from: float = 0.7

    def done_at(self, step: int, seconds: float) -> float:
        """Returns the share of the run that is over."""
        return step / self.num_steps if self.seconds is None else seconds / self.seconds

    def learning_rate_at(self, step: int, done: float) -> float:
        """Returns the learning rate: a cosine down to the final rate, reached by a linear warm-up."""
        span = self.learning_rate - self.final_learning_rate
        rate = self.final_learning_rate + span * 0.5 * (1 + math.cos(math.pi * done))
        return rate * min(1.0, (step + 1) / self.num_warmup_steps)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class DraftTrainer:
    """Owns the weights and the optimiser of one run. shared: the backbone's embedding and head [V, D]."""

    def __init__(
        self, weights: Weights, shared: tuple[Tensor, Tensor], data: dict[str, Streams], recipe: DraftRecipe
    ) -> None:
        self.recipe, self.data = recipe, data
        self.embed, self.head = (tensor.detach().float() for tensor in shared)
        self.device = self.embed.device
        self.weights = {name: value.to(self.device).requires_grad_(name != _SELECTS) for name, value in weights.items()}
        matrices = [w for name, w in self.weights.items() if w.dim() >= 2]
        others = [w for name, w in self.weights.items() if w.dim() < 2 and name != _SELECTS]
        groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=recipe.betas, fused=True)
        self.generator = torch.Generator(device=self.device).manual_seed(recipe.seed)
        self.places = {kind: Places.of(found.rows.ids.shape[1], self.device) for kind, found in data.items()}
        self.counts = torch.zeros(FIELDS["n_routed_experts"], device=self.device)
        self.curve: list[dict[str, float]] = []

    def run(self, log: Callable[[str], None], save: Callable[[], None], log_every: int = 100) -> None:
        """Runs all steps. Every ``log_every`` steps it logs a line and a point of the curve, and saves."""
        start = time.perf_counter()
        seen: dict[str, list[Tensor]] = {}
        kinds = [kind for kind in PATTERN if kind in self.data]
        step = 0
        while (done := self.recipe.done_at(step, time.perf_counter() - start)) < 1:
            kind = kinds[step % len(kinds)]
            seen.setdefault(kind, []).append(self.step(step, done, kind))
            step += 1
            if step % log_every == 0:
                self._log(step, time.perf_counter() - start, seen)
                log(" ".join(f"{key}={value:.4g}" for key, value in self.curve[-1].items()))
                save()
        save()

    def _log(self, step: int, seconds: float, seen: dict[str, list[Tensor]]) -> None:
        point = {"step": float(step), "seconds": round(seconds, 2)}
        for name, stats in seen.items():
            loss, agreed, counted = torch.stack(stats).sum(0).tolist()
            point |= {f"{name}_loss": loss / len(stats), f"{name}_agreed": agreed / max(1.0, counted)}
        seen.clear()
        self.curve.append(point)

    def step(self, step: int, done: float, kind: str) -> Tensor:
        """One update from randomly drawn rows of a kind. Returns its loss, agreed and counted answer tokens."""
        recipe, data = self.recipe, self.data[kind]
        num_rows = max(1, int(NUM_ROWS[kind] * recipe.row_share))
        chosen = torch.randint(len(data.h), (num_rows,), generator=self.generator, device=self.device)
        weights = straight_through(self.weights) if done >= recipe.quantised_from else self.weights
        loss, stats = self.loss(weights, data, chosen, self.places[kind], self._count)
        loss.backward()
        trained = [weight for group in self.optimizer.param_groups for weight in group["params"]]
        torch.nn.utils.clip_grad_norm_(trained, recipe.max_grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.learning_rate_at(step, done)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._balance()
        return stats

    def loss(self, weights: Weights, data: Streams, chosen: Tensor, places: Places, see: Any) -> tuple[Tensor, Tensor]:
        """Returns the mean loss of the chosen rows, and the sums that the curve is made of.

        At place p the module has seen token p + 1; the target is the backbone's distribution at p + 1, of token p + 2.
        """
        ids, role = data.rows.ids[chosen].long(), data.rows.role[chosen]
        embedded = self.embed[ids[:, 1:]]
        embedded = F.pad(embedded, (0, 0, 0, 1))
        h = draft_hidden(weights, data.streams[chosen].float(), embedded, places, see)[:, :-2]
        with torch.no_grad():
            target = F.linear(data.h[chosen][:, 1:-1].float(), self.head)
            share = target.softmax(-1)
        logits = F.linear(h, self.head)
        losses = -(share * logits.log_softmax(-1)).sum(-1)
        answer = (role[:, 2:] == ANSWER).float()
        weight = answer + self.recipe.prompt_weight * (role[:, 2:] == PROMPT).float()
        agreed = (logits.argmax(-1) == target.argmax(-1)).float() * answer
        loss = (losses * weight).sum() / weight.sum()
        return loss, torch.stack([loss.detach(), agreed.sum(), answer.sum()])

    def _count(self, name: str, *values: Tensor) -> None:
        if name == "ffn.experts":
            self.counts += (values[-1].detach() > 0).float().sum(0)

    @torch.no_grad()
    def _balance(self) -> None:
        """Raises the selection bias of experts that had fewer tokens than the mean, and lowers the others'."""
        self.weights[_SELECTS] += self.recipe.balance_step * torch.sign(self.counts.mean() - self.counts)
        self.counts.zero_()


def trained_weights(trainer: DraftTrainer) -> Weights:
    """Returns the weights on the CPU: BF16 where the checkpoint's value is made from BF16, float32 elsewhere."""
    kept = ("hc_", "attn.attn_sink", _SELECTS)
    found = {}
    for name, weight in trainer.weights.items():
        value = weight.detach().cpu()
        found[name] = value if name.startswith(kept) else value.bfloat16()
    return found
