"""DeepSeek-V4's forward written a second time, in float64, one sequence at once, with the published code's roundings.

It shares no code with the package: it reads the shards, decodes the formats from their definitions (docs/numerics.md),
and computes every layer over the whole sequence, without caches. ``official`` names the steps that round.

Legend: T tokens, D hidden, S streams, N heads, H head dim, C compressed entries.
"""

import json
import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

GRID = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], dtype=torch.float64)


def nearest_e2m1(x: Tensor) -> Tensor:
    """The nearest of the sixteen values, a tie to the even code."""
    size = x.abs().double().clamp(max=6)
    below = torch.searchsorted(GRID, size.contiguous(), right=True) - 1
    above = (below + 1).clamp(max=7)
    middle = (GRID[below] + GRID[above]) / 2
    goes_up = (size > middle) | ((size == middle) & (above % 2 == 0))
    return torch.where(goes_up, GRID[above], GRID[below]) * x.sign()


def nearest_e4m3(x: Tensor) -> Tensor:
    return x.float().clamp(-448, 448).to(torch.float8_e4m3fn).double()


def blocks_of(x: Tensor, size: int) -> Tensor:
    """float32 values as [..., blocks, size]; the last block is filled with zeros."""
    return F.pad(x.float(), (0, -x.shape[-1] % size)).unflatten(-1, (-1, size))


def power_of_two_scale(amax: Tensor, largest: float) -> Tensor:
    return torch.exp2(torch.ceil(torch.log2(amax.double() / largest)))


def fp8(x: Tensor, size: int) -> Tensor:
    blocks = blocks_of(x, size)
    scale = power_of_two_scale(blocks.abs().amax(-1, keepdim=True).clamp(min=1e-4), 448)
    return (nearest_e4m3(blocks.double() / scale) * scale).flatten(-2)[..., : x.shape[-1]]


def fp4(x: Tensor, size: int) -> Tensor:
    blocks = blocks_of(x, size)
    scale = power_of_two_scale(blocks.abs().amax(-1, keepdim=True).clamp(min=6 * 2.0**-126), 6)
    return (nearest_e2m1(blocks.double() / scale) * scale).flatten(-2)[..., : x.shape[-1]]


def nvfp4_without_global(x: Tensor, input_scale: Tensor) -> Tensor:
    blocks = blocks_of(x, 16)
    six = torch.tensor(6.0)
    scale = nearest_e4m3(blocks.abs().amax(-1, keepdim=True) / six / input_scale).float()
    unit = scale * input_scale
    codes = torch.where(unit == 0, 0.0, nearest_e2m1(blocks / unit))
    return (codes * scale.double()).flatten(-2)


def hadamard_matrix(size: int) -> Tensor:
    one = torch.ones(1, 1, dtype=torch.float64)
    while len(one) < size:
        one = torch.cat((torch.cat((one, one), 1), torch.cat((one, -one), 1)))
    return one / math.sqrt(size)


class OfficialForward:
    """``logits`` of a sequence. official: names of steps, as ``--numerics`` takes them."""

    def __init__(self, folder: Path, official: Collection[str]) -> None:
        self.c: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self.official = official
        self.t: dict[str, Tensor] = {}
        for shard in folder.glob("*.safetensors"):
            self.t.update(load_file(shard))

    def logits(self, token_ids: list[int]) -> Tensor:
        """float64 [T, V]."""
        return self.head(self.streams(token_ids))

    def draft_logits(self, token_ids: list[int]) -> Tensor:
        """Of ``mtp.0``, for each token but the last, whose follower is not known: float64 [T - 1, V]."""
        following = token_ids[1:]
        e_TD = self.rms(self.t["embed.weight"][following].double(), "mtp.0.enorm")
        h_TSD = self.rms(self.streams(token_ids)[:-1], "mtp.0.hnorm")
        x_TSD = self.linear("mtp.0.e_proj", e_TD)[:, None] + self.linear("mtp.0.h_proj", h_TSD)
        return self.head(self.layer("mtp.0", 0, x_TSD, following), "mtp.0.")

    def streams(self, token_ids: list[int]) -> Tensor:
        """After the last layer: float64 [T, S, D]."""
        x_TSD = self.t["embed.weight"][token_ids].double()[:, None].repeat(1, self.c["hc_mult"], 1)
        for layer in range(self.c["num_hidden_layers"]):
            x_TSD = self.layer(f"layers.{layer}", self.c["compress_ratios"][layer], x_TSD, token_ids)
        return x_TSD

    def layer(self, name: str, ratio: int, x_TSD: Tensor, token_ids: list[int]) -> Tensor:
        for part in ("attn", "ffn"):
            h_TD, post, comb = self.pre(f"{name}.hc_{part}", x_TSD)
            h_TD = self.rms(h_TD, f"{name}.{part}_norm")
            is_attention = part == "attn"
            y_TD = self.attention(f"{name}.attn", h_TD, ratio) if is_attention else self.ffn(name, h_TD, token_ids)
            x_TSD = post[..., None] * y_TD[:, None] + torch.einsum("tjk,tjd->tkd", comb, x_TSD)
        return x_TSD

    def head(self, x_TSD: Tensor, name: str = "") -> Tensor:
        logits = self.mixes(f"{name}hc_head", x_TSD) * self.t[f"{name}hc_head_scale"] + self.t[f"{name}hc_head_base"]
        h_TD = ((torch.sigmoid(logits) + self.c["hc_eps"])[..., None] * x_TSD).sum(1)
        return self.linear("head", self.rms(h_TD, f"{name}norm"))

    def mixes(self, name: str, x_TSD: Tensor) -> Tensor:
        flat = x_TSD.flatten(1)
        rms = torch.rsqrt(flat.square().mean(-1, keepdim=True) + self.c["rms_norm_eps"])
        return (flat @ self.t[f"{name}_fn"].double().T) * rms

    def pre(self, name: str, x_TSD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        s, eps = self.c["hc_mult"], self.c["hc_eps"]
        scale, base = self.t[f"{name}_scale"].double(), self.t[f"{name}_base"].double()
        m = self.mixes(name, x_TSD)
        pre = torch.sigmoid(m[:, :s] * scale[0] + base[:s]) + eps
        post = 2 * torch.sigmoid(m[:, s : 2 * s] * scale[1] + base[s : 2 * s])
        comb = ((m[:, 2 * s :] * scale[2] + base[2 * s :]).view(-1, s, s)).softmax(-1) + eps
        comb = comb / (comb.sum(1, keepdim=True) + eps)
        for _ in range(self.c["hc_sinkhorn_iters"] - 1):
            comb = comb / (comb.sum(2, keepdim=True) + eps)
            comb = comb / (comb.sum(1, keepdim=True) + eps)
        return (pre[..., None] * x_TSD).sum(1), post, comb

    def rms(self, x: Tensor, name: str | None) -> Tensor:
        y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.c["rms_norm_eps"])
        return y if name is None else y * self.t[f"{name}.weight"].double()

    def attention(self, name: str, x_TD: Tensor, ratio: int) -> Tensor:
        c, num_tokens = self.c, len(x_TD)
        qr = self.rms(self.linear(f"{name}.wq_a", x_TD, fused=f"{name}.wkv"), f"{name}.q_norm")
        q = self.rms(self.linear(f"{name}.wq_b", qr).unflatten(-1, (c["num_attention_heads"], -1)), None)
        positions = torch.arange(num_tokens)
        q = self.rotate(q, positions, ratio)
        kv = self.rms(self.linear(f"{name}.wkv", x_TD, fused=f"{name}.wq_a"), f"{name}.kv_norm")
        keys = self.keep(self.rotate(kv, positions, ratio))
        age = positions[:, None] - positions
        visible = (age >= 0) & (age < c["sliding_window"])
        if ratio:
            entries = self.keep(self.compressed(f"{name}.compressor", x_TD, ratio))
            seen = torch.arange(len(entries)) < ((positions + 1) // ratio)[:, None]
            if ratio == 4:
                seen = self.selected(f"{name}.indexer", x_TD, qr, seen)
            keys, visible = torch.cat((keys, entries)), torch.cat((visible, seen), 1)
        scores = torch.einsum("tnh,kh->tnk", q, keys) * c["head_dim"] ** -0.5
        scores = scores.masked_fill(~visible[:, None], -math.inf)
        sink = self.t[f"{name}.attn_sink"].double().expand(num_tokens, -1)[..., None]
        weights = torch.cat((scores, sink), -1).softmax(-1)[..., :-1]
        o = self.rotate(torch.einsum("tnk,kh->tnh", weights, keys), positions, ratio, inverse=True)
        grouped = o.flatten(1).unflatten(-1, (c["o_groups"], -1))
        wo_a = self.matrix(f"{name}.wo_a").float().double()  # read back once, at load
        wo_a = wo_a.view(c["o_groups"], c["o_lora_rank"], -1)
        return self.linear(f"{name}.wo_b", torch.einsum("tgi,gri->tgr", grouped, wo_a).flatten(1))

    def keep(self, kv: Tensor) -> Tensor:
        if "kv" not in self.official:
            return kv
        plain, rotary = kv.split((kv.shape[-1] - self.c["qk_rope_head_dim"], self.c["qk_rope_head_dim"]), -1)
        return torch.cat((fp8(plain, 64), rotary), -1)

    def compressed(self, name: str, x_TD: Tensor, ratio: int) -> Tensor:
        kv, score = (self.matrix(f"{name}.{part}") for part in ("wkv", "wgate"))
        num_windows = len(x_TD) // ratio
        kv, score = ((x_TD @ w.T)[: num_windows * ratio].unflatten(0, (num_windows, ratio)) for w in (kv, score))
        score = score + self.t[f"{name}.ape"].double()
        if ratio == 4:
            half = kv.shape[-1] // 2
            before = F.pad(kv[:-1, :, :half], (0, 0, 0, 0, 1, 0))
            before_score = F.pad(score[:-1, :, :half], (0, 0, 0, 0, 1, 0), value=-math.inf)
            kv = torch.cat((before, kv[..., half:]), 1)
            score = torch.cat((before_score, score[..., half:]), 1)
        entries = self.rms((kv * score.softmax(1)).sum(1), f"{name}.norm")
        return self.rotate(entries, torch.arange(num_windows) * ratio, ratio)

    def selected(self, name: str, x_TD: Tensor, qr: Tensor, seen: Tensor) -> Tensor:
        c = self.c
        positions = torch.arange(len(x_TD))
        q = self.linear(f"{name}.wq_b", qr).unflatten(-1, (c["index_n_heads"], -1))
        q, k = self.rotate(q, positions, 4), self.compressed(f"{name}.compressor", x_TD, 4)
        if "indexer" in self.official:
            h = hadamard_matrix(c["index_head_dim"])
            q, k = fp4((q @ h).float(), 32), fp4((k @ h).float(), 32)
        weights = self.linear(f"{name}.weights_proj", x_TD) * (c["index_head_dim"] * c["index_n_heads"]) ** -0.5
        scores = (torch.einsum("tih,ch->tic", q, k).relu() * weights[..., None]).sum(1).masked_fill(~seen, -math.inf)
        if scores.shape[1] <= c["index_topk"]:
            return seen
        best = scores.sort(dim=-1, descending=True, stable=True).indices[:, : c["index_topk"]]
        return torch.zeros_like(seen).scatter(1, best, True) & seen

    def rotate(self, x: Tensor, positions: Tensor, ratio: int, inverse: bool = False) -> Tensor:
        c = self.c
        dim, scaling = c["qk_rope_head_dim"], c.get("rope_scaling") if ratio else None
        theta = c["compress_rope_theta"] if ratio else c["rope_theta"]
        freqs = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
        if scaling:
            wavelengths = (
                scaling["original_max_position_embeddings"] / (scaling[turns] * 2 * math.pi)
                for turns in ("beta_fast", "beta_slow")
            )
            low, high = (dim * math.log(length) / (2 * math.log(theta)) for length in wavelengths)
            low, high = max(math.floor(low), 0), min(math.ceil(high), dim - 1)
            ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / max(high - low, 0.001)).clamp(0, 1)
            freqs = freqs / scaling["factor"] * ramp + freqs * (1 - ramp)
        angles = (positions[:, None].float() * freqs).view(len(positions), *[1] * (x.ndim - 2), -1)
        turn = torch.complex(angles.cos().double(), angles.sin().double() * (-1 if inverse else 1))
        pairs = torch.view_as_complex(x[..., -dim:].contiguous().unflatten(-1, (-1, 2)))
        return torch.cat((x[..., :-dim], torch.view_as_real(pairs * turn).flatten(-2)), -1)

    def ffn(self, layer: str, x_TD: Tensor, token_ids: list[int]) -> Tensor:
        c, name = self.c, f"{layer}.ffn"
        scores = F.softplus(self.linear(f"{name}.gate", x_TD)).sqrt()
        if f"{name}.gate.tid2eid" in self.t:
            chosen = self.t[f"{name}.gate.tid2eid"][token_ids].long()
        else:
            biased = scores + self.t[f"{name}.gate.bias"].double()
            chosen = biased.sort(dim=-1, descending=True, stable=True).indices[:, : c["num_experts_per_tok"]]
        weights = scores.gather(1, chosen)
        weights = weights / weights.sum(1, keepdim=True) * c["routed_scaling_factor"]
        y = self.expert(f"{name}.shared_experts", x_TD, None)
        for expert in range(c["n_routed_experts"]):
            rows, slots = torch.where(chosen == expert)
            if len(rows):
                y[rows] += self.expert(f"{name}.experts.{expert}", x_TD[rows], weights[rows, slots, None])
        return y

    def expert(self, name: str, x_TD: Tensor, weight: Tensor | None) -> Tensor:
        limit = self.c["swiglu_limit"]
        gate = self.linear(f"{name}.w1", x_TD, fused=f"{name}.w3")
        up = self.linear(f"{name}.w3", x_TD, fused=f"{name}.w1")
        hidden = F.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit)
        if weight is None:
            return self.linear(f"{name}.w2", hidden)
        if "routing_weight" in self.official:
            return self.linear(f"{name}.w2", weight * hidden)
        return weight * self.linear(f"{name}.w2", hidden)

    def linear(self, name: str, x: Tensor, fused: str | None = None) -> Tensor:
        """x Wᵀ. fused: the matrix that shares the input, hence the input scale."""
        weight, t = self.t[f"{name}.weight"], self.t
        if f"{name}.weight_scale_2" in t:
            codes, global_scale = self.blocks(name), t[f"{name}.weight_scale_2"]
            if "nvfp4_inputs" not in self.official:
                return (x @ codes.T) * global_scale.double()
            input_scales = [t[f"{part}.input_scale"] for part in (name, fused) if f"{part}.input_scale" in t]
            input_scale = torch.stack(input_scales).max()
            y = nvfp4_without_global(x.flatten(0, -2), input_scale) @ codes.T
            return (y * (input_scale * global_scale).double()).view(*x.shape[:-1], -1)
        if f"{name}.scale" in t and "fp8_inputs" in self.official:
            x = fp8(x, 128)
        return x @ (self.matrix(name) if f"{name}.scale" in t else weight.double()).T

    def matrix(self, name: str) -> Tensor:
        """An FP8, MXFP4 or plain matrix in float64."""
        weight = self.t[f"{name}.weight"]
        if f"{name}.scale" not in self.t:
            return weight.double()
        raw = self.t[f"{name}.scale"]
        scale = torch.exp2(raw.view(torch.uint8).double() - 127) if raw.element_size() == 1 else raw.double()
        if weight.dtype == torch.float8_e4m3fn:
            wide = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
            return weight.double() * wide[: weight.shape[0], : weight.shape[1]]
        return self.values(weight) * scale.repeat_interleave(32, 1)

    def blocks(self, name: str) -> Tensor:
        """An NVFP4 matrix without its global scale."""
        return self.values(self.t[f"{name}.weight"]) * self.t[f"{name}.weight_scale"].double().repeat_interleave(16, 1)

    @staticmethod
    def values(packed: Tensor) -> Tensor:
        raw = packed.view(torch.uint8).long()
        codes = torch.stack((raw & 15, raw >> 4), -1).flatten(-2)
        return GRID[codes & 7] * torch.where(codes & 8 > 0, -1.0, 1.0).double()
