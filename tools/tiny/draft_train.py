"""Trains the draft by distillation: at each place, the backbone's distribution of the token after the next one."""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ownpath.bench.timing import capture_graph
from tiny.batches import ANSWER, PROMPT
from tiny.draft import Places, Weights, draft_hidden, stored_values
from tiny.network import FIELDS
from tiny.streams import Streams

PATTERN = (
    *("tools", "request", "short", "tools", "middle", "many tools", "brief", "request"),
    *("tools", "long", "short", "tools", "request", "many tools", "middle", "short"),
)
NUM_ROWS = {"brief": 512, "short": 256, "request": 96, "middle": 64, "long": 24, "tools": 24, "many tools": 16}
_SELECTS = "ffn.gate.bias"
_QUANTISED_EVERY = 4


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


class Turn:
    """A step on rows of one kind: loss and gradients, as a captured CUDA graph or eagerly.

    used: the weights that the step computes with; it leaves its gradients there.
    """

    def __init__(self, trainer: "DraftTrainer", data: Streams, num_rows: int) -> None:
        self.trainer, self.data = trainer, data
        self.places = Places.of(data.rows.ids.shape[1], trainer.device)
        self.chosen = torch.zeros(num_rows, dtype=torch.long, device=trainer.device)
        self.stats = torch.zeros(3, device=trainer.device)
        self.replay: Callable[[], None] = self.forward_backward

    def run(self) -> Tensor:
        """Draws rows and runs. Returns the loss, agreed and counted answer tokens."""
        drawn = torch.randint(
            len(self.data.h), self.chosen.shape, generator=self.trainer.generator, device=self.trainer.device
        )
        self.chosen.copy_(drawn)
        self.replay()
        return self.stats.clone()

    def forward_backward(self) -> None:
        """Adds the chosen rows' gradients to those of ``used``.

        At place p the module has seen token p + 1; the target is the backbone's distribution at p + 1, of token p + 2.
        """
        trainer, data = self.trainer, self.data
        ids, role = data.rows.ids[self.chosen].long(), data.rows.role[self.chosen]
        embedded = F.pad(trainer.embed[ids[:, 1:]], (0, 0, 0, 1))
        streams = data.streams[self.chosen].float()
        h = draft_hidden(trainer.used, streams, embedded, self.places, trainer.count)[:, :-2]
        with torch.no_grad():
            target = F.linear(data.h[self.chosen][:, 1:-1].float(), trainer.head)
            share = target.softmax(-1)
        logits = F.linear(h, trainer.head)
        losses = -(share * logits.log_softmax(-1)).sum(-1)
        answer = (role[:, 2:] == ANSWER).float()
        weight = answer + trainer.recipe.prompt_weight * (role[:, 2:] == PROMPT).float()
        loss = (losses * weight).sum() / weight.sum()
        loss.backward()
        with torch.no_grad():
            agreed = (logits.argmax(-1) == target.argmax(-1)).float() * answer
            self.stats.copy_(torch.stack([loss.detach(), agreed.sum(), answer.sum()]))


class DraftTrainer:
    """Owns the weights and the optimiser of one run. shared: the backbone's embedding and head [V, D].

    masters: what the optimiser updates. used: their values, or late in the run those that are stored, with whose
    gradients the masters are updated.
    """

    def __init__(
        self, weights: Weights, shared: tuple[Tensor, Tensor], data: dict[str, Streams], recipe: DraftRecipe
    ) -> None:
        self.recipe = recipe
        self.embed, self.head = (tensor.detach().float() for tensor in shared)
        self.device = self.embed.device
        self.masters = {name: value.to(self.device).clone() for name, value in weights.items()}
        self.used = {name: value.clone().requires_grad_(name != _SELECTS) for name, value in self.masters.items()}
        self.trained = [name for name in self.masters if name != _SELECTS]
        self.grads = [torch.zeros_like(self.used[name]) for name in self.trained]
        for name, grad in zip(self.trained, self.grads, strict=True):
            self.used[name].grad = self.masters[name].grad = grad
        matrices = [self.masters[name] for name in self.trained if self.masters[name].dim() >= 2]
        others = [self.masters[name] for name in self.trained if self.masters[name].dim() < 2]
        groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=recipe.betas, fused=True)
        self.generator = torch.Generator(device=self.device).manual_seed(recipe.seed)
        self.counts = torch.zeros(FIELDS["n_routed_experts"], device=self.device)
        rows = {kind: max(1, int(NUM_ROWS[kind] * recipe.row_share)) for kind in data}
        self.turns = {kind: Turn(self, found, rows[kind]) for kind, found in data.items()}
        self.curve: list[dict[str, float]] = []

    def capture(self) -> str:
        """Records every kind's step as a CUDA graph; the weights stay unchanged. Returns what became of it: steps that
        cannot be captured run eagerly."""
        for kind, turn in self.turns.items():
            try:
                turn.replay = capture_graph([turn.forward_backward], num_warm_ups=2).replay
            except RuntimeError as error:
                return f"not captured from {kind} on: {error}"
        self._clear()
        return "captured"

    def run(self, log: Callable[[str], None], save: Callable[[], None], log_every: int = 100) -> None:
        """Runs all steps. Every ``log_every`` steps it logs a line and a point of the curve, and saves."""
        start = time.perf_counter()
        seen: dict[str, list[Tensor]] = {}
        kinds = [kind for kind in PATTERN if kind in self.turns]
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
        """One update from rows of a kind. Returns its loss, agreed and counted answer tokens."""
        recipe = self.recipe
        self._refresh(step, done >= recipe.quantised_from)
        stats = self.turns[kind].run()
        torch.nn.utils.clip_grad_norm_([self.masters[name] for name in self.trained], recipe.max_grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.learning_rate_at(step, done)
        self.optimizer.step()
        self._balance()
        self._clear()
        return stats

    @torch.no_grad()
    def _refresh(self, step: int, quantised: bool) -> None:
        """Sets the used weights from the masters; to the stored values every few steps only, which takes longer."""
        if quantised and step % _QUANTISED_EVERY:
            return
        values = stored_values(self.masters) if quantised else self.masters
        torch._foreach_copy_([self.used[name] for name in values], list(values.values()))

    @torch.no_grad()
    def _clear(self) -> None:
        torch._foreach_zero_(self.grads)
        self.counts.zero_()

    def count(self, name: str, *values: Tensor) -> None:
        """Counts the tokens of each expert."""
        if name == "ffn.experts":
            self.counts += (values[-1].detach() > 0).float().sum(0)

    @torch.no_grad()
    def _balance(self) -> None:
        """Raises the selection bias of experts that had fewer tokens than the mean, and lowers the others'."""
        self.masters[_SELECTS] += self.recipe.balance_step * torch.sign(self.counts.mean() - self.counts)


def trained_weights(trainer: DraftTrainer) -> Weights:
    """Returns the weights on the CPU: BF16 where the checkpoint's value is made from BF16, float32 elsewhere."""
    kept = ("hc_", "attn.attn_sink", _SELECTS)
    found = {}
    for name, weight in trainer.masters.items():
        value = weight.detach().cpu()
        found[name] = value if name.startswith(kept) else value.bfloat16()
    return found
