"""The training loop: seven kinds of rows, one captured CUDA graph each, FP32 masters, quantised weights at the end."""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ownpath.bench.timing import capture_graph
from tiny.batches import ANSWER, PROMPT, Rows
from tiny.distill import IndexerTeacher
from tiny.fakequant import MasterWeights
from tiny.fast import make_fast
from tiny.network import window_mask

# Every kind has 12,288 tokens in a step, so that what is compiled for one serves all.
PATTERN = (
    *("brief", "tools", "middle", "request", "short", "tools", "long", "middle"),
    *("request", "many tools", "brief", "tools", "middle", "request", "short", "long"),
)
# For a network that knows everything except how to read tools' names: two thirds of the steps have tools.
TOOLS_PATTERN = (
    *("tools", "many tools", "request", "tools", "many tools", "middle", "tools", "short"),
    *("tools", "many tools", "brief", "tools", "many tools", "middle", "tools", "long"),
)
PATTERNS = {"even": PATTERN, "tools": TOOLS_PATTERN}
# A new network must learn to copy before anything else. It learns that from lists, short ones first.
OPENING_PATTERN = ("brief", "short", "middle", "long")
NUM_ROWS = {"brief": 512, "short": 256, "request": 96, "middle": 64, "long": 24, "tools": 24, "many tools": 16}
SAVE_SECONDS = 60.0


@dataclass(frozen=True)
class Recipe:
    """Settings of a training run.

    quantised_from: share of the steps after which weights are quantised in every forward.
    num_rows: rows of one step, by kind; steps go through the kinds in turn.
    pattern: the turns, one of ``PATTERNS``.
    num_opening_steps: steps at the start that go through ``OPENING_PATTERN`` instead.
    prompt_weight: weight of a prompt token in the loss; an answer token has 1.
    balanced_until: share of the steps after which the routers' selection biases stay as they are.
    """

    seed: int = 20261122
    num_steps: int = 12_000
    num_warmup_steps: int = 200
    num_opening_steps: int = 2_000
    pattern: str = "even"
    num_rows: dict[str, int] = field(default_factory=lambda: dict(NUM_ROWS))
    learning_rate: float = 1.5e-3
    final_learning_rate: float = 2e-5
    weight_decay: float = 0.02
    betas: tuple[float, float] = (0.9, 0.95)
    max_grad_norm: float = 1.0
    prompt_weight: float = 0.05
    indexer_weight: float = 0.1
    balance_step: float = 1e-3
    quantised_from: float = 0.6
    balanced_until: float = 0.9

    def learning_rate_at(self, step: int) -> float:
        """Returns the learning rate: linear warm-up, then a cosine down to the final rate."""
        if step < self.num_warmup_steps:
            return self.learning_rate * (step + 1) / self.num_warmup_steps
        done = (step - self.num_warmup_steps) / max(1, self.num_steps - self.num_warmup_steps)
        span = self.learning_rate - self.final_learning_rate
        return self.final_learning_rate + span * 0.5 * (1 + math.cos(math.pi * done))

    def kind_at(self, step: int) -> str:
        """Returns the kind of rows that a step learns from."""
        pattern = OPENING_PATTERN if step < self.num_opening_steps else PATTERNS[self.pattern]
        return pattern[step % len(pattern)]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Bucket:
    """Rows of one width and the step that learns from them: a captured CUDA graph, or eager on CPU."""

    def __init__(self, rows: Rows, num_rows: int, network: Any, teacher: IndexerTeacher, recipe: Recipe) -> None:
        self.rows, self.network, self.teacher, self.recipe = rows, network, teacher, recipe
        width, device = rows.ids.shape[1], rows.ids.device
        self.ids = torch.zeros(num_rows, width, dtype=torch.long, device=device)
        self.role = torch.zeros(num_rows, width, dtype=torch.uint8, device=device)
        self.stats = torch.zeros(3, device=device)
        mask = window_mask(width, network.config.sliding_window, str(device))
        self.mask = mask.expand(num_rows, -1, -1, -1)
        self.replay: Callable[[], None] = self.forward_backward

    def draw(self, generator: torch.Generator) -> None:
        """Copies randomly drawn rows to the step's input."""
        device = self.rows.ids.device
        chosen = torch.randint(self.rows.ids.shape[0], (self.ids.shape[0],), generator=generator, device=device)
        self.ids.copy_(self.rows.ids[chosen])
        self.role.copy_(self.rows.role[chosen])

    def forward_backward(self) -> None:
        """Adds this input's gradients to the parameters; sets ``stats``: loss, right answer tokens, answer tokens."""
        logits = self.network(input_ids=self.ids, attention_mask={"window": self.mask}, use_cache=False).logits
        logits, target, role = logits[:, :-1].float(), self.ids[:, 1:], self.role[:, 1:]
        weight = (role == ANSWER).float() + self.recipe.prompt_weight * (role == PROMPT).float()
        losses = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none")
        loss = (losses * weight.flatten()).sum() / weight.sum()
        total = loss + self.recipe.indexer_weight * self.teacher.loss()
        total.backward()
        with torch.no_grad():
            answer = role == ANSWER
            right = (logits.argmax(dim=-1) == target) & answer
            self.stats.copy_(torch.stack([loss.detach(), right.sum().float(), answer.sum().float()]))

    def capture(self) -> None:
        """Records the step as a CUDA graph, after the warm-up runs that capturing needs."""
        self.replay = capture_graph([self.forward_backward], num_warm_ups=3).replay


class Trainer:
    """Owns the network, the master weights and the optimiser of one run."""

    def __init__(self, network: Any, rows: dict[str, Rows], recipe: Recipe, compiled: bool) -> None:
        self.network, self.recipe = network.eval(), recipe
        device = next(network.parameters()).device
        self.on_gpu = device.type == "cuda"
        self.counters = make_fast(network, compiled)
        teacher = IndexerTeacher(network)
        self.weights = MasterWeights(network)
        self.buckets = {
            kind: Bucket(rows[kind], num_rows, network, teacher, recipe) for kind, num_rows in recipe.num_rows.items()
        }
        self.generator = torch.Generator(device=device).manual_seed(recipe.seed)
        self.optimizer = torch.optim.AdamW(self._parameter_groups(), lr=0.0, betas=recipe.betas, fused=self.on_gpu)
        self.curve: list[dict[str, float]] = []

    def _parameter_groups(self) -> list[dict[str, Any]]:
        matrices = [master for master in self.weights.masters if master.dim() >= 2]
        others = [master for master in self.weights.masters if master.dim() < 2]
        return [{"params": matrices, "weight_decay": self.recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]

    def capture(self) -> None:
        """Records every width's step as a CUDA graph; the weights stay unchanged."""
        for bucket in self.buckets.values():
            bucket.draw(self.generator)
            bucket.capture()
        self.weights.collect_gradients()
        for counter in self.counters:
            counter.counts.zero_()

    def run(self, log: Callable[[str], None], save: Callable[[], None], log_every: int = 80) -> None:
        """Runs all steps. Every ``log_every`` steps it logs a line and a point of the curve; it saves once a minute."""
        start = last_saved = time.perf_counter()
        seen = {kind: torch.zeros_like(bucket.stats) for kind, bucket in self.buckets.items()}
        turns = dict.fromkeys(self.buckets, 0)
        for step in range(self.recipe.num_steps):
            kind = self.recipe.kind_at(step)
            self.step(step, self.buckets[kind])
            seen[kind] += self.buckets[kind].stats
            turns[kind] += 1
            if (step + 1) % log_every == 0 or step + 1 == self.recipe.num_steps:
                self._log(step + 1, time.perf_counter() - start, seen, turns)
                log(" ".join(f"{key}={value:.5g}" for key, value in self.curve[-1].items()))
                if time.perf_counter() - last_saved > SAVE_SECONDS:
                    save()
                    last_saved = time.perf_counter()

    def step(self, step: int, bucket: Bucket) -> None:
        recipe, done = self.recipe, step / self.recipe.num_steps
        self.weights.refresh(quantised=done >= recipe.quantised_from)
        bucket.draw(self.generator)
        bucket.replay()
        self.weights.collect_gradients()
        torch.nn.utils.clip_grad_norm_(self.weights.masters, recipe.max_grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.learning_rate_at(step)
        self.optimizer.step()
        for counter in self.counters:
            counter.balance(recipe.balance_step if done < recipe.balanced_until else 0.0)

    def _log(self, step: int, seconds: float, seen: dict[str, Tensor], turns: dict[str, int]) -> None:
        entry = {"step": float(step), "seconds": round(seconds, 2), "learning_rate": self.recipe.learning_rate_at(step)}
        for kind, stats in seen.items():
            loss, right, total = stats.tolist()
            if turns[kind]:
                entry[f"{kind}_loss"] = loss / turns[kind]
                entry[f"{kind}_answer_tokens_right"] = right / max(1.0, total)
            stats.zero_()
            turns[kind] = 0
        self.curve.append(entry)
